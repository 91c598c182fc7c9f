"""Formats with a table of levels, against torch's own types and slow bit-level readers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsearch.formats import parse_format
from bitsearch.formats.levels import TABLES, LevelFormat
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.rtn import quantize

NAMES = [
    "nf3-g64", "nf4-g32", "fp4-g16", "fp6", "fp6-e2m3-g64", "fp8", "fp8-g128", "fp8-e5m2",
    "mxfp4", "mxfp6", "mxfp6-e2m3", "mxfp8", "mxfp8-e5m2", "mxint8", "nvfp4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)]
)
def test_eight_bit_floats_are_those_of_torch(kind: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    for ours, value in zip(TABLES[kind].values, theirs.tolist(), strict=True):
        if math.isfinite(value):
            assert ours == value
        else:
            assert math.isnan(ours)


def test_small_floats_are_those_of_the_standard() -> None:
    """OCP Microscaling Formats v1.0, tables 2 to 5: maxima and smallest steps."""
    half = [value for value in TABLES["mxfp4"].values if value >= 0][:8]
    assert half == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for kind, largest, smallest in (("fp6", 28.0, 0.0625), ("fp6-e2m3", 7.5, 0.125)):
        values = [value for value in TABLES[kind].values if value > 0]
        assert (max(values), min(values)) == (largest, smallest)
    assert max(v for v in TABLES["mxint8"].values if v == v) == 127 / 64


def test_normal_float_is_the_published_one() -> None:
    """QLoRA, appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert TABLES["nf4"].values == pytest.approx(published, abs=1e-6)
    assert len(set(TABLES["nf3"].values)) == 8


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(rows=st.integers(1, 3), columns=st.integers(1, 150), seed=st.integers(0, 2**32 - 1))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    name: str, rows: int, columns: int, seed: int
) -> None:
    format = parse_format(name)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    encoded = quantize(weight, format)
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(rows, columns)
    back = codec_of(format).unpack(packed, format, columns)
    assert torch.equal(back.dequantize(), encoded.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_values_that_can_be_represented_are_kept(name: str) -> None:
    format = parse_format(name)
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    if name == "nvfp4":
        # The largest weight fixes the scale of the matrix: let it be the largest value.
        weight[0] = 0.0
        weight[0, 0] = 64.0
    once = quantize(weight, format)
    again = quantize(once.dequantize(), format)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_outliers(name: str) -> None:
    weight = torch.zeros(3, 70)
    assert torch.equal(quantize(weight, parse_format(name)).dequantize(), weight)
    weight[1, 5] = 1e4
    found = quantize(weight, parse_format(name)).dequantize()
    assert found[1, 5] == pytest.approx(1e4, rel=0.2) and int((found != 0).sum()) == 1


def decode_micro(packed: dict[str, Tensor], format: LevelFormat, columns: int) -> list[list[float]]:
    """The values of a block-scaled matrix, read bit by bit as the standards word it."""
    rows = []
    for codes, scales in zip(packed["codes"].tolist(), packed["scales"].tolist(), strict=True):
        bits = "".join(f"{byte:08b}"[::-1] for byte in codes)
        row = []
        for column in range(columns):
            start = column * format.bits
            code = int(bits[start : start + format.bits][::-1], 2)
            scale = scales[column // (format.group_size or columns)]
            if format.table.scale == "e8m0":
                scale = 2.0 ** (scale - 127)
            else:
                scale *= float(packed["scale"])
            row.append(element(code, format) * scale)
        rows.append(row)
    return rows


def element(code: int, format: LevelFormat) -> float:
    """A four-, six- or eight-bit element from its fields."""
    if format.kind == "mxint8":
        return (code - 256 if code > 127 else code) / 64
    exponent_bits, bias = {"mxfp4": (2, 1), "nvfp4": (2, 1), "mxfp6": (3, 3), "mxfp8": (4, 7)}[
        format.kind
    ]
    mantissa_bits = format.bits - 1 - exponent_bits
    sign = -1 if code >> (format.bits - 1) else 1
    power = code >> mantissa_bits & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    if power == 0:
        return float(sign * fraction * 2.0 ** (1 - bias))
    return float(sign * (1 + fraction) * 2.0 ** (power - bias))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8", "mxint8", "nvfp4"])
def test_packed_bits_mean_what_the_standard_says(name: str, tmp_path: Path) -> None:
    format = parse_format(name)
    assert isinstance(format, LevelFormat)
    weight = torch.randn(5, 80, generator=torch.Generator().manual_seed(3)) * 0.02
    encoded = quantize(weight, format)
    save_file(encoded.pack(), tmp_path / "packed.safetensors")
    stored = load_file(tmp_path / "packed.safetensors")
    if name == "nvfp4":
        stored["scales"] = stored["scales"].float()
    values = torch.tensor(decode_micro(stored, format, 80))
    torch.testing.assert_close(encoded.dequantize(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "element_power"), [("mxfp4", 2), ("mxfp6", 4), ("mxfp8", 8)])
def test_no_worse_than_the_conversion_of_the_standard(name: str, element_power: int) -> None:
    """OCP MX v1.0, section 6.3: scale 2^(floor(log2 max) − e), elements to nearest, saturated."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    blocks = weight.view(64, 8, 32)
    scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).log2().floor() - element_power)
    levels = torch.tensor([value for value in TABLES[name].values if value == value])
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)
    plain = (levels[nearest] * scale - blocks).square().mean()
    ours = (quantize(weight, parse_format(name)).dequantize() - weight).square().mean()
    assert ours <= plain * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_distortion_stays_above_the_bound_and_below_plain_rounding(name: str) -> None:
    """Rate-distortion: 4^−b of the stored bits; above: a power-of-two FP4 at .0133, 8 bits less."""
    weight = torch.randn(128, 2048, generator=torch.Generator().manual_seed(7))
    format = parse_format(name)
    error = float((quantize(weight, format).dequantize() - weight).square().mean())
    stored_bits = 8 * format.bytes(*weight.shape) / weight.numel()
    assert error > 4.0**-stored_bits
    assert error < {3: 0.04, 4: 0.0133, 6: 0.0031, 8: 0.0031}[format.bits]


def test_importance_moves_the_error_to_other_columns() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    importance = torch.ones(64)
    importance[::8] = 100.0
    format = parse_format("nf3-g64")
    plain = (quantize(weight, format).dequantize() - weight).square()
    weighted = (quantize(weight, format, importance).dequantize() - weight).square()
    assert weighted[:, ::8].mean() < 0.9 * plain[:, ::8].mean()
