"""A dense and a sparse matrix: which weights are kept, in what bytes, and their sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_array
from torch import Tensor

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format
from bitsearch.formats.sparse import SparseFormat
from bitsearch.quantizers import gptq, sparse
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.feedback import output_errors
from bitsearch.quantizers.rtn import quantize
from bitsearch.quantizers.second_moment import SecondMoment

NAMES = [
    "int3-g16+sparse1%", "int2-g32-fz+sparse3%", "int4-row-sym+sparse0.45%", "lut3-row+sparse2%",
    "nf4-g16+sparse5%", "nvfp4+sparse0.1%", "mxfp4+sparse1%", "dialect4-b32+sparse1%",
    "int3-g16-s3+sparse1%",
]  # fmt: skip


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int) -> SecondMoment:
    """Inputs whose columns hang together."""
    mixing = normal(columns, columns, seed) * torch.logspace(0, -2, columns)[:, None]
    inputs = normal(2 * columns, columns, seed + 1) @ mixing
    return SecondMoment(inputs.mT @ inputs / len(inputs))


def kept(encoded: object, columns: int) -> set[tuple[int, int]]:
    """Rows and columns of the outliers, as they are stored."""
    packed: dict[str, Tensor] = encoded.pack()  # type: ignore[attr-defined]
    rows = np.repeat(np.arange(len(packed["starts"]) - 1), np.diff(packed["starts"]))
    return set(zip(rows.tolist(), packed["columns"].tolist(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_read_back_as_it_is_printed(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    "name",
    ["int3-g16+sparse", "int3-g16+sparse0%", "int3-g16+sparse1", "int3-g16+sparse01%",
     "gguf-q8_0+sparse1%", "bf16+sparse1%", "int3-g16+sparse1%+fp16x4", "int3-g16+sparse1.50%"],
)  # fmt: skip
def test_what_is_no_such_format_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown format"):
        parse_format(name)


def test_bytes_by_hand() -> None:
    """10 × 100 weights: 0.45 % are 4.5, so 5 outliers of 4 bytes; 11 row pointers of 4; and
    int3-g32: 38 bytes of codes, 4 scales of 2, 4 zero points in 2 bytes a row.
    """
    assert parse_format("int3-g32+sparse0.45%").bytes(10, 100) == 20 + 44 + 10 * (38 + 8 + 2)
    assert not parse_format("int3-g32+sparse1%").fits(65_537)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(rows=st.integers(1, 5), columns=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    name: str, rows: int, columns: int, seed: int
) -> None:
    format, weight = parse_format(name), normal(rows, columns, seed)
    encoded = quantize(weight, format, weight.square().mean(0))
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(rows, columns)
    back = codec_of(format).unpack(packed, format, columns)
    assert torch.equal(back.dequantize(), encoded.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_on_disk(tmp_path: Path, name: str) -> None:
    """With all outliers in a few rows, and rows without any."""
    format, file, weight = parse_format(name), tmp_path / "packed.safetensors", normal(33, 101, 0)
    weight[3:5] *= 50
    found = gptq.quantize(weight, format, None, correlated(101, 1))
    save_file(found.pack(), file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == format.bytes(33, 101)
    back = codec_of(format).unpack(load_file(file), format, 101)
    assert torch.equal(back.dequantize(), found.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_is_what_scipy_reads_in_compressed_rows(name: str) -> None:
    format, weight = parse_format(name), normal(12, 90, 2).pow(3)
    assert isinstance(format, SparseFormat)
    found = quantize(weight, format)
    packed = found.pack()
    parts = [packed[key].numpy() for key in ("values", "columns", "starts")]
    added = csr_array((parts[0].astype(np.float32), *parts[1:]), shape=(12, 90))
    dense = {key[6:]: value for key, value in packed.items() if key.startswith("dense.")}
    base = codec_of(format.base).unpack(dense, format.base, 90).dequantize()
    assert torch.equal(base + torch.from_numpy(added.toarray()), found.dequantize())
    assert added.nnz == format.outliers(12, 90)


@pytest.mark.parametrize("name", ["int3-g32+sparse1%", "nf4-g16+sparse1%", "int2-g64-sym+sparse1%"])
@pytest.mark.parametrize("statistics", [True, False])
def test_outliers_of_groups_are_those_whose_absence_helps_most(name: str, statistics: bool) -> None:
    """Leave-one-out, one by one: the group without its largest, without its smallest weight;
    of the others what each loses itself.
    """
    format, rows, columns = parse_format(name), 6, 100
    assert isinstance(format, SparseFormat)
    base, size = format.base, format.base.group_size or 0
    weight = normal(rows, columns, 3).pow(3)
    h = normal(1, columns, 4)[0].square() if statistics else torch.ones(columns)
    gains = {}

    def loss(values: Tensor) -> Tensor:
        return (quantize(values, base, h).dequantize() - values).double().square() * h

    whole = loss(weight)
    for row in range(rows):
        for start in range(0, columns, size):
            group = slice(start, min(start + size, columns))
            ends = {int(weight[row, group].argmax()), int(weight[row, group].argmin())}
            for place in range(group.start, group.stop):
                gains[row, place] = float(whole[row, place])
                if place - start in ends:
                    less = weight.clone()
                    less[row, place] = 0.0
                    after = loss(less)[row, group].sum() - loss(less)[row, place]
                    gains[row, place] = max(
                        gains[row, place], float(whole[row, group].sum() - after)
                    )
    best = set(sorted(gains, key=lambda at: -gains[at])[: format.outliers(rows, columns)])
    assert kept(quantize(weight, format, h if statistics else None), columns) == best


def test_outliers_of_rows_are_the_largest_and_a_ninth_of_the_sensitive() -> None:
    """20 of 2,000: 17 by size; then the 3 largest h (w − ŵ)² in a table without those."""
    format, weight, h = parse_format("int3-row-sym"), normal(20, 100, 5), torch.rand(100)
    order = weight.abs().flatten().argsort(descending=True)
    large = {divmod(int(at), 100) for at in order[:17]}
    less = weight.flatten().index_fill(0, order[:17], 0.0).view(20, 100)
    losses = (quantize(less, format, h).dequantize() - weight).square() * h
    losses.view(-1)[order[:17]] = 0.0
    sensitive = {divmod(int(at), 100) for at in losses.flatten().argsort(descending=True)[:3]}
    found = quantize(weight, parse_format("int3-row-sym+sparse1%"), h)
    assert kept(found, 100) == large | sensitive


@pytest.mark.parametrize(("name", "worse"), [("int3-g64", 5), ("int3-row", 5), ("lut3-row", 1.2)])
def test_outliers_no_longer_stretch_the_others(name: str, worse: float) -> None:
    """One weight of a group or row thirty times too large: without it the rest is Gaussian."""
    clean = normal(64, 64, 7)
    weight = clean.clone()
    places = torch.randint(64, (64,), generator=torch.Generator().manual_seed(8))
    weight[torch.arange(64), places] = 30.0
    others = weight != 30.0

    def error(format: str, values: Tensor) -> float:
        found = quantize(values, parse_format(format)).dequantize() - values
        return float(found.square()[others].mean())

    assert error(name, weight) > worse * error(name, clean)
    assert error(f"{name}+sparse1.8%", weight) < 1.05 * error(name, clean)


def test_a_table_does_not_count_what_is_taken_out() -> None:
    """Zeros in the outliers' places would take an entry, for all weights are near 5."""
    clean = 5 + 0.1 * normal(32, 100, 9)
    weight = clean.clone()
    weight[:, 40] = 99.0
    error = (quantize(weight, parse_format("lut2-row+sparse1%")).dequantize() - weight).square()
    alone = (quantize(clean, parse_format("lut2-row")).dequantize() - clean).square()
    assert float(error.sum()) < 1.1 * float(alone.sum())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(rows=st.integers(1, 5), columns=st.integers(2, 100), seed=st.integers(0, 2**31))
def test_feedback_makes_no_row_worse(name: str, rows: int, columns: int, seed: int) -> None:
    weight, moment, format = normal(rows, columns, seed), correlated(columns, 8), parse_format(name)
    plain = quantize(weight, format, moment.matrix.diagonal())
    found = gptq.quantize(weight, format, moment.matrix.diagonal(), moment)
    after, before = (output_errors(weight, each, moment) for each in (found, plain))
    assert bool((after <= before).all())
    assert kept(found, columns) == kept(plain, columns)


def test_feedback_passes_outliers_by() -> None:
    """All but one weight a row kept in 16 bits: that one's error moves those after it, and
    they follow it exactly, so that the output error falls to what no others can take up.
    """
    moment = correlated(32, 10)
    weight = normal(16, 32, 11)
    found = gptq.quantize(
        weight, parse_format("int2-g32+sparse97%"), moment.matrix.diagonal(), moment
    )
    plain = quantize(weight, parse_format("int2-g32+sparse97%"), moment.matrix.diagonal())
    after, before = (float(output_errors(weight, each, moment).sum()) for each in (found, plain))
    assert after < 0.2 * before


def test_outliers_beyond_float16_are_refused() -> None:
    weight = normal(4, 64, 12)
    weight[1, 3] = 1e6
    with pytest.raises(BadInput, match=r"beyond float16.*--freeze"):
        quantize(weight, parse_format("mxfp8+sparse1%"))


@pytest.mark.parametrize("columns", [[3, 2, 9], [3, 9, 64]])
def test_damaged_rows_are_refused(columns: list[int]) -> None:
    format = parse_format("int3-g16+sparse1%")
    packed = quantize(normal(4, 64, 13), format).pack()
    assert packed["values"].shape == (3,)
    packed["starts"] = torch.tensor([0, 3, 3, 3, 3]).to(torch.int32)
    packed["columns"] = torch.tensor(columns).to(torch.uint16)
    with pytest.raises(ValueError, match="in no order"):
        codec_of(format).unpack(packed, format, 64)


def test_rows_looked_at_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = normal(40, 64, 14).pow(3), normal(1, 64, 15)[0].square()
    for name in ("int3-g16+sparse2%", "lut2-row+sparse2%"):
        whole = quantize(weight, parse_format(name), h)
        monkeypatch.setattr(sparse, "_CHUNK", 7 * 64)
        assert torch.equal(quantize(weight, parse_format(name), h).dequantize(), whole.dequantize())
        monkeypatch.undo()
