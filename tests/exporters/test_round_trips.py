"""What a target can express comes back from its files as it was."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitsearch.errors import BadInput
from bitsearch.exporters import load_exporter
from bitsearch.exporters.base import Reading
from bitsearch.exporters.pipeline import export_policy, policy_of
from bitsearch.formats import BF16, Format, parse_formats
from bitsearch.models.layout import find_layout, skeleton
from bitsearch.models.load import open_layout
from bitsearch.units import ModelLayout

# What the integer targets have in common, and what only some of them have.
EXPRESSIBLE = {
    "compressed-tensors": "int{2,3,4,5,6,7,8}-g{16,32,64,128}{,-sym},int{2,3,8}-row{,-sym},fp8,"
    "mxfp4,mxfp8,bf16",
    "gptqmodel": "int{2,3,4,8}-g{16,32,64,128}{,-sym},int{2,3,8}-row{,-sym},bf16",
    "autoround": "int{2,3,4,8}-g{16,32,64,128}{,-sym},int{2,3,8}-row{,-sym},bf16",
    "modelopt": "nvfp4,int8-row-sym,int4-g{64,128}-sym,bf16",
    "torchao": "int{2,3,4,5,6,7,8}-g{16,32,64,128}{,-sym},int{2,3,8}-row{,-sym},bf16",
}


def untied() -> ModelLayout:
    """The shipped model with a head of its own."""
    config = open_layout("tiny")[1]
    config.tie_word_embeddings = False
    return find_layout(skeleton(config), reference="untied")


LAYOUTS = (open_layout("tiny")[0], untied())


def assigned(layout: ModelLayout, formats: Sequence[Format]) -> dict[str, Format]:
    """A format for each unit; the embedding stays at 16 bits, as no such target takes it."""
    found = {}
    for unit, format in zip(layout.units, formats, strict=False):
        for matrix in unit.matrices:
            found[matrix.name] = BF16 if unit.kind == "embedding" else format
    return found


@pytest.mark.parametrize("target", EXPRESSIBLE)
@settings(max_examples=25)
@given(data=st.data())
def test_export_then_import_is_the_identity(target: str, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    some = st.sampled_from(parse_formats(EXPRESSIBLE[target]))
    formats = assigned(layout, data.draw(st.lists(some, min_size=26, max_size=26), "formats"))
    exporter = load_exporter(target)
    policy = policy_of(layout, {}, Reading(formats), {})
    translation = exporter.translate(policy)
    assert translation.losses == () and dict(translation.formats) == formats
    with tempfile.TemporaryDirectory() as folder:
        try:
            exporter.write(policy, translation, Path(folder), None)
        except BadInput as error:
            assert "nothing is quantized" in str(error)
            assert all(format.exact for format in formats.values())
            return
        assert exporter.read is not None
        reading = exporter.read(Path(folder), layout)
    again = policy_of(layout, {}, reading, {})
    assert again.modules == policy.modules and again.formats == policy.formats
    assert reading.notes == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bytes_are_predicted_in_every_dtype(
    make_policy: Callable[[Mapping[str, str]], Path], tmp_path: Path, dtype: str
) -> None:
    policy = make_policy({"0.mlp.down_proj": "int4-g32-sym"})
    for target in ("compressed-tensors", "gptqmodel", "autoround", "torchao"):
        told = export_policy(policy, target, tmp_path / target, model="tiny", dtype=dtype)
        assert told["tensor_bytes"] == told["predicted_bytes"]
        stored = load_file(tmp_path / target / "model.safetensors")
        assert str(stored["model.norm.weight"].dtype) == f"torch.{dtype}"
        assert json.loads((tmp_path / target / "config.json").read_text())["dtype"] == dtype
