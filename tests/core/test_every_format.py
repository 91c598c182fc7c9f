"""What every format that is listed owes: exact bytes on disk, values as measured, a bound."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitsearch.catalogue import catalogue
from bitsearch.formats import Format, parse_format
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.rtn import quantize

NAMES = [str(row["name"]) for row in catalogue("formats") if row["name"] not in ("bf16", "fp16")]
OTHERS = ["int4-g48", "int3-g7-fz", "fp4-g16", "fp6-g48", "nf4-row", "int2-g5-sym"]


def columns_of(format: Format, wanted: int) -> int:
    """The next row length that can be stored."""
    return next(n for n in range(wanted, wanted + 257) if format.fits(n))


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_families_are_all_there() -> None:
    kinds = {parse_format(name).kind for name in NAMES}
    assert len(NAMES) > 100 and len(kinds) > 30


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_bytes_on_disk_and_values(name: str, tmp_path: Path) -> None:
    """A last group that is shorter, rows whose codes end within a byte, and one row alone."""
    format = parse_format(name)
    assert format.name == name
    for rows, wanted in ((3, 301), (1, 33)):
        shape = rows, columns_of(format, wanted)
        encoded = quantize(0.02 * normal(*shape, seed=rows), format)
        file = tmp_path / f"{rows}.safetensors"
        save_file(encoded.pack(), file)
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - 8 - header == format.bytes(*shape)
        read = codec_of(format).unpack(load_file(file), format, shape[1])
        assert torch.equal(read.dequantize(), encoded.dequantize())


@settings(max_examples=60)
@given(
    st.sampled_from([*NAMES, *OTHERS]),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_shape(name: str, rows: int, wanted: int, seed: int, scale: float) -> None:
    format = parse_format(name)
    shape = rows, columns_of(format, wanted)
    weight = scale * normal(*shape, seed)
    encoded = quantize(weight, format)
    values = encoded.dequantize()
    assert values.shape == weight.shape and bool(values.isfinite().all())
    assert float((values - weight).square().sum()) <= float(weight.square().sum())
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(*shape)
    back = codec_of(format).unpack(packed, format, shape[1])
    assert torch.equal(back.dequantize(), values)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_the_rate_distortion_bound_is_not_crossed(name: str) -> None:
    """No code of b bits, all counted, has less than 4^−b of the variance of Gaussian weights."""
    format = parse_format(name)
    shape = 64, columns_of(format, 1024)
    weight = normal(*shape, seed=5)
    error = float((quantize(weight, format).dequantize() - weight).square().mean())
    bits = 8 * format.bytes(*shape) / weight.numel()
    assert 4.0**-bits < error


@pytest.mark.parametrize(
    ("name", "best"), [("int3-row-fz", 0.0375), ("int4-row-fz", 0.0116), ("int5-row-fz", 0.0036)]
)
def test_long_rows_come_near_the_best_uniform_step(name: str, best: float) -> None:
    """Gaussian weights without groups: a uniform quantizer can reach that, and no better."""
    weight = normal(64, 4096, seed=1)
    error = float((quantize(weight, parse_format(name)).dequantize() - weight).square().mean())
    assert 0.98 * best < error < 1.08 * best


@pytest.mark.parametrize(("name", "known"), [("mxfp4", 0.0133), ("fp4-g16", 0.0089)])
def test_four_bit_floats_with_both_kinds_of_scale(name: str, known: float) -> None:
    """No worse than plain conversion, whose distortion on Gaussian weights is known."""
    format, weight = parse_format(name), normal(128, 2048, seed=2)
    size = format.group_size or 0
    blocks = weight.view(len(weight), -1, size)
    peak = blocks.abs().amax(-1, keepdim=True)
    scale = torch.exp2(peak.log2().floor() - 2) if name == "mxfp4" else peak / 6
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = levels[(blocks.abs()[..., None] / scale[..., None] - levels).abs().argmin(-1)]
    plain = float((nearest * scale - blocks.abs()).square().mean())
    assert plain == pytest.approx(known, rel=0.02)
    ours = float((quantize(weight, format).dequantize() - weight).square().mean())
    assert ours <= plain


def test_order_of_rows_does_not_matter() -> None:
    """Rows are stored by themselves, where no scale is that of the whole matrix."""
    order = list(range(5))
    random.Random(0).shuffle(order)
    for name in NAMES:
        format = parse_format(name)
        if format.kind == "nvfp4" or "+" in name:
            continue
        weight = normal(5, columns_of(format, 64), seed=3)
        values = quantize(weight, format).dequantize()
        assert torch.equal(quantize(weight[order], format).dequantize(), values[order]), name
