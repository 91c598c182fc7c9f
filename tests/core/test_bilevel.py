"""Integers with quantized scales and zero points: bytes, and what a second level costs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format
from bitsearch.quantizers import bilevel
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.rtn import quantize

NAMES = ["int3-g16-s3", "int2-g8-s4", "int4-g32-s2", "int8-g16-s8"]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_read_back_as_it_is_printed(name: str) -> None:
    assert parse_format(name).name == name
    for other in (name.replace("-s", "-s1"), f"{name}-sym", name.replace("-g", "-row-g")):
        with pytest.raises(UsageError):
            parse_format(other)


def test_bytes_by_hand() -> None:
    """10 × 1000 weights, 63 groups of 16, which make 4 groups of scales: 375 bytes of codes;
    twice 24 bytes of 3-bit statistics (189 bits) and 4 float16 scales and biases, a row.
    """
    assert parse_format("int3-g16-s3").bytes(10, 1000) == 10 * (375 + 2 * (24 + 4 * 4))
    assert parse_format("int3-g16-s3").bytes(4096, 4096) * 8 / 4096**2 == 3.625


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(rows=st.integers(1, 4), columns=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    name: str, rows: int, columns: int, seed: int
) -> None:
    format = parse_format(name)
    encoded = quantize(normal(rows, columns, seed), format)
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(rows, columns)
    back = codec_of(format).unpack(packed, format, columns)
    assert torch.equal(back.dequantize(), encoded.dequantize())


def bits(row: bytes, place: int, width: int) -> int:
    """One code of a packed row, low bit first."""
    return int.from_bytes(row, "little") >> (place * width) & (2**width - 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_decoded_bit_by_bit(tmp_path: Path, name: str) -> None:
    """w = s (q − z), s and z each code · scale + bias of 16 groups."""
    format, file, shape = parse_format(name), tmp_path / "packed.safetensors", (3, 299)
    found = quantize(normal(*shape), format, normal(1, 299, 1)[0].square())
    save_file(found.pack(), file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == format.bytes(*shape)
    stored = load_file(file)
    width, size = int(name[-1]), format.group_size or 0

    def statistic(part: str, row: int, group: int) -> float:
        code = bits(stored[f"{part}.codes"][row].numpy().tobytes(), group, width)
        scale, bias = (float(stored[f"{part}.{x}"][row, group // 16]) for x in ("scales", "biases"))
        return code * scale + bias

    values = found.dequantize()
    for row in range(3):
        for column in range(0, 299, 7):
            code = bits(stored["codes"][row].numpy().tobytes(), column, format.bits)
            scale, zero = (statistic(part, row, column // size) for part in ("scales", "zeros"))
            expected = pytest.approx(scale * (code - zero), rel=1e-5, abs=1e-6)
            assert float(values[row, column]) == expected


def test_more_rounds_never_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h, losses = normal(16, 512).pow(3), normal(1, 512, 1)[0].square(), []
    for rounds in (1, 2, 4, 8):
        monkeypatch.setattr(bilevel, "_ROUNDS", rounds)
        found = quantize(weight, parse_format("int3-g16-s3"), h).dequantize()
        losses.append((found - weight).square().mul(h).sum(1))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[-1].sum()) < 0.95 * float(losses[0].sum())


def test_fewer_bits_than_plain_groups_and_less_error() -> None:
    """On Gaussian weights a second level of 4 bits costs less than whole zero points do."""
    weight = normal(64, 1024, 2)
    errors, sizes = {}, {}
    for name in ("int3-g16", "int3-g32", "int3-g16-s2", "int3-g16-s3", "int3-g16-s6"):
        format = parse_format(name)
        errors[name] = float((quantize(weight, format).dequantize() - weight).square().mean())
        sizes[name] = format.bytes(64, 1024)
    assert errors["int3-g16-s6"] < errors["int3-g16-s3"] < errors["int3-g16-s2"]
    assert errors["int3-g16-s3"] < errors["int3-g32"]
    assert sizes["int3-g16-s3"] < sizes["int3-g16"]
    for name, error in errors.items():
        assert error > 4.0 ** (
            -8 * sizes[name] / weight.numel()
        )  # the bound of rate and distortion


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_weights_are_kept(name: str, value: float) -> None:
    found = quantize(torch.full((2, 100), value), parse_format(name)).dequantize()
    torch.testing.assert_close(found, torch.full((2, 100), value), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_zeros_beside_others_stay_small(name: str) -> None:
    weight = normal(4, 256, 3)
    weight[:, 32:64] = 0.0
    found = quantize(weight, parse_format(name)).dequantize()
    assert bool(found.isfinite().all())
    assert float((found - weight).square().mean()) < float(weight.square().mean())


def test_importance_moves_the_error_to_other_columns() -> None:
    weight, format = normal(32, 256, 4), parse_format("int2-g16-s4")
    h = torch.where(torch.arange(256) % 8 == 0, 100.0, 1.0)
    aware, blind = (quantize(weight, format, x).dequantize() - weight for x in (h, None))
    assert aware.square().mul(h).sum() < 0.8 * blind.square().mul(h).sum()
    none = quantize(weight, format, torch.zeros(256)).dequantize() - weight
    assert torch.equal(none, blind)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, format = normal(300, 200, 5), parse_format("int3-g16-s3")
    whole = quantize(weight, format).dequantize()
    assert torch.equal(whole[137:138], quantize(weight[137:138], format).dequantize())


@pytest.mark.parametrize("peak", [1e7, 1e30])
def test_scales_beyond_float16_are_refused(peak: float) -> None:
    weight = normal(4, 64, 6)
    weight[2, 40] = peak
    with pytest.raises(BadInput, match=r"beyond float16.*--freeze"):
        quantize(weight, parse_format("int3-g16-s3"))
