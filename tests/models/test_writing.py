"""Safetensors files written piece by piece are those that the library writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from bitsearch.models.writing import DeclaredFile, GatheredFile, content, file_parts

DTYPES = [torch.uint64, torch.int64, torch.float64, torch.float32, torch.uint32, torch.int32,
          torch.bfloat16, torch.float16, torch.uint16, torch.int16, torch.float8_e8m0fnu,
          torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Some tensors of any shapes and types."""
    names = draw(st.lists(st.text(min_size=1, max_size=6), max_size=6, unique=True))
    found = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        found[name] = torch.randint(0, 100, shape, dtype=torch.int16).to(dtype)
    return found


@settings(max_examples=60)
@given(tensors(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1))
def test_same_bytes_as_the_library(found: dict[str, Tensor], metadata: dict[str, str]) -> None:
    ours = b"".join(file_parts(found, metadata))
    assert ours == save(found, metadata=metadata or None)


def test_tensors_that_lie_otherwise_in_memory(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    found = {"turned": tensor.mT, "part": tensor[:, 1::2], "one": torch.tensor(3.0)}
    file = tmp_path / "tensors.safetensors"
    file.write_bytes(b"".join(file_parts(found, {"b": "1", "a": "2"})))
    stored = load_file(file)
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[name], value) for name, value in found.items())
    assert content(tensor.mT) == tensor.mT.numpy().tobytes()


def test_types_that_no_file_holds() -> None:
    with pytest.raises(KeyError):
        list(file_parts({"x": torch.zeros(2, dtype=torch.complex64)}, {}))


@settings(max_examples=40)
@given(tensors(), st.randoms(), st.booleans())
def test_one_by_one_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[str, Tensor],
    shuffled: random.Random,
    declared: bool,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]
    header = {"format": "pt"}
    path = folder / "x.safetensors"
    with DeclaredFile(path, entries, header) if declared else GatheredFile(path, header) as file:
        names = sorted(found)
        shuffled.shuffle(names)
        for name in names:
            file.put(name, found[name])
    assert path.read_bytes() == save(found, metadata=header)
    assert [file.name for file in folder.iterdir()] == ["x.safetensors"]


def test_what_was_declared_must_come(tmp_path: Path) -> None:
    entries = [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]
    with (
        pytest.raises(ValueError, match="b was not written"),
        DeclaredFile(tmp_path / "x", entries, {}) as file,
    ):
        file.put("a", torch.zeros(2))


def test_nothing_is_left_of_a_gathered_file_that_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), GatheredFile(tmp_path / "x", {}) as file:
        file.put("a", torch.zeros(2))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
