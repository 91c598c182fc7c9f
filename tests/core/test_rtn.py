"""Rounding to nearest: exactness, error against references, hard inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format, parse_format
from bitsearch.formats.integer import IntFormat
from bitsearch.quantizers.quantized import unpack
from bitsearch.quantizers.rtn import quantize

# Distortion E|Δ|²/E|W|² of plain asymmetric rounding on Gaussian weights.
PLAIN = {
    "g32": (0.154, 0.0281, 0.00611, 0.00143, 0.00035),
    "g64": (0.203, 0.0370, 0.00805, 0.00188, 0.00046),
    "g128": (0.250, 0.0457, 0.00993, 0.00233, 0.00056),
    "row": (0.506, 0.0897, 0.0196, 0.00458, 0.00111),
}
formats = st.builds(
    IntFormat,
    kind=st.just("int"),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 1, 5, 16, 32]),
    symmetric=st.booleans(),
)


def random_weight(rows: int, columns: int, seed: int, scale: float = 1.0) -> Tensor:
    """Gaussian weights."""
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    """Σ h_j Δ_ij²."""
    h = torch.ones(weight.shape[1]) if importance is None else importance
    return float((h * (decoded - weight).double().square()).sum())


def plain(weight: Tensor, format: Format) -> list[Tensor]:
    """Min-max rounding group by group with float16 scales, in each usual convention."""
    levels = 2**format.bits - 1
    size = format.group_size or weight.shape[1]
    results = []
    for divisor in ((levels - 1) / 2, (levels + 1) / 2) if format.symmetric else (levels,):
        decoded = torch.empty_like(weight)
        for start in range(0, weight.shape[1], size):
            part = weight[:, start : start + size]
            low = part.amin(1, keepdim=True).clamp(max=0)
            high = part.amax(1, keepdim=True).clamp(min=0)
            span = torch.maximum(-low, high) if format.symmetric else high - low
            scale = (span / divisor).half().float().clamp(min=2.0**-24)
            zero = (
                torch.full_like(low, (levels + 1) // 2)
                if format.symmetric
                else (-low / scale).round().clamp(0, levels)
            )
            codes = ((part / scale).round() + zero).clamp(0, levels)
            decoded[:, start : start + size] = (codes - zero) * scale
        results.append(decoded)
    return results


@settings(max_examples=60)
@given(
    formats,
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 10.0]),
    st.booleans(),
    st.booleans(),
)
def test_never_worse_than_plain_rounding(
    format: Format,
    rows: int,
    columns: int,
    seed: int,
    scale: float,
    weighted: bool,
    heavy_tailed: bool,
) -> None:
    weight = random_weight(rows, columns, seed, scale)
    weight = weight.pow(3) if heavy_tailed else weight
    importance = random_weight(1, columns, seed + 1)[0].square() if weighted else None
    found = weighted_error(weight, quantize(weight, format, importance).dequantize(), importance)
    # Integer sums within a group may round differently in the last place of float32.
    slack = 1e-5 * weighted_error(weight, torch.zeros_like(weight), importance) * 4.0**-format.bits
    for reference in plain(weight, format):
        assert found <= weighted_error(weight, reference, importance) * (1 + 1e-4) + slack


@given(formats, st.integers(1, 4), st.integers(1, 70), st.integers(0, 10**6))
def test_what_is_stored_decodes_to_what_was_measured(
    format: Format, rows: int, columns: int, seed: int
) -> None:
    quantized = quantize(random_weight(rows, columns, seed), format)
    stored = unpack(quantized.pack(), format, columns)
    assert torch.equal(stored.dequantize(), quantized.dequantize())
    assert int(quantized.codes.max()) < 2**format.bits


@pytest.mark.parametrize("group", PLAIN)
@pytest.mark.parametrize("bits", range(2, 7))
def test_distortion_of_gaussian_weights(group: str, bits: int) -> None:
    weight = random_weight(64, 4096, bits)
    decoded = quantize(weight, parse_format(f"int{bits}-{group}")).dequantize()
    distortion = float((decoded - weight).square().sum() / weight.square().sum())
    assert distortion <= 1.02 * PLAIN[group][bits - 2]
    # Scales come on top of the codes: the bound holds for all bits together.
    extra = 0.0 if group == "row" else (16 + bits) / int(group[1:])
    assert distortion >= 0.98 * 4.0 ** -(bits + extra)
    if group == "row":
        assert distortion >= 4.0**-bits


@pytest.mark.parametrize("name", ["int3-g16", "int4-g32", "int4-row", "int3-g32-sym"])
def test_importance_moves_error_to_columns_that_matter_less(name: str) -> None:
    format, weight = parse_format(name), random_weight(64, 96, 0)
    importance = torch.where(torch.arange(96) % 8 == 0, 100.0, 1.0)
    aware = quantize(weight, format, importance).dequantize()
    blind = quantize(weight, format).dequantize()
    assert weighted_error(weight, aware, importance) < weighted_error(weight, blind, importance)
    assert weighted_error(weight, blind, None) < weighted_error(weight, aware, None)


def test_scaling_importance_changes_nothing() -> None:
    weight, format = random_weight(8, 64, 1), parse_format("int3-g32")
    importance = random_weight(1, 64, 2)[0].square()
    one, other = (quantize(weight, format, factor * importance) for factor in (1.0, 2.0**20))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("name", ["int8-g32", "int8-row", "int8-g32-sym", "int4-g32", "int2-row"])
def test_grid_values_are_reproduced_exactly(name: str) -> None:
    format = parse_format(name)
    levels = 2**format.bits
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, levels, (16, 64), generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, levels - 1
    zero = levels // 2 if format.symmetric else levels // 3
    weight = (codes - zero).float() * 0.0078125
    assert torch.equal(quantize(weight, format).dequantize(), weight)


@pytest.mark.parametrize("bits", range(2, 9))
def test_both_ends_of_a_symmetric_range_are_reproduced(bits: int) -> None:
    """Symmetric codes reach one step further down than up; ternary weights still fit."""
    weight = torch.where(random_weight(8, 64, 0) > 0, 0.5, -0.5)
    weight[:, ::3] = 0.0
    decoded = quantize(weight, parse_format(f"int{bits}-g32-sym")).dequantize()
    assert torch.allclose(decoded, weight, rtol=2.0**-11, atol=0.0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("suffix", ["g32", "g32-sym", "row"])
def test_zeros_stay_zeros(bits: int, suffix: str) -> None:
    format = parse_format(f"int{bits}-{suffix}")
    assert not quantize(torch.zeros(3, 40), format).dequantize().any()
    weight = random_weight(4, 96, 0)
    weight[:, 32:64] = 0.0
    decoded = quantize(weight, format).dequantize()
    assert not decoded[:, 32:64].any()


@pytest.mark.parametrize("value", [-3.0, -1e-3, 0.3, 250.0])
@pytest.mark.parametrize("name", ["int2-g32", "int4-g32", "int8-row", "int3-g32-sym"])
def test_constant_groups_are_exact_to_the_scale(name: str, value: float) -> None:
    """One code holds the value; only the rounding of its scale to float16 is left."""
    decoded = quantize(torch.full((2, 40), value), parse_format(name)).dequantize()
    assert torch.allclose(decoded, torch.full((2, 40), value), rtol=2.0**-10, atol=2.0**-17)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-8, 1e-6])
@pytest.mark.parametrize("name", ["int2-g32", "int4-row", "int8-g32-sym"])
def test_tiny_weights_are_never_made_larger_than_they_are_wrong(name: str, scale: float) -> None:
    """Below the smallest float16 scale, zero is the best there is."""
    weight = random_weight(4, 64, 0, scale)
    decoded = quantize(weight, parse_format(name)).dequantize()
    assert torch.isfinite(decoded).all()
    assert weighted_error(weight, decoded, None) <= weighted_error(weight, 0 * weight, None)


@pytest.mark.parametrize("name", ["int2-g32", "int4-g32", "int4-row", "int8-g32-sym", "int8-row"])
@pytest.mark.parametrize("peak", [1e8, 1e20, 3e38])
def test_a_scale_beyond_float16_is_refused(name: str, peak: float) -> None:
    weight = random_weight(4, 64, 0)
    weight[2, 40] = peak
    with pytest.raises(BadInput, match=r"beyond float16.*--freeze"):
        quantize(weight, parse_format(name))


def test_large_weights_that_fit_are_kept() -> None:
    weight = random_weight(4, 64, 0, 3e4)
    decoded = quantize(weight, parse_format("int8-g32")).dequantize()
    assert float((decoded - weight).abs().max() / weight.abs().max()) < 0.01


def test_groups_without_importance_are_quantized_as_if_all_columns_mattered() -> None:
    weight, format = random_weight(4, 64, 3), parse_format("int3-g32")
    importance = torch.ones(64)
    importance[:32] = 0.0
    assert torch.equal(
        quantize(weight, format, importance).dequantize(), quantize(weight, format).dequantize()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_as_their_float32_values(dtype: torch.dtype) -> None:
    weight, format = random_weight(4, 64, 4).to(dtype), parse_format("int4-g32")
    assert torch.equal(quantize(weight, format).codes, quantize(weight.float(), format).codes)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, format = random_weight(300, 1000, 5), parse_format("int3-g64")
    whole = quantize(weight, format).dequantize()
    assert torch.equal(whole[137:138], quantize(weight[137:138], format).dequantize())


def test_weights_are_left_alone() -> None:
    weight, importance = random_weight(4, 64, 6), torch.rand(64)
    before = weight.clone(), importance.clone()
    quantize(weight, parse_format("int3-g32"), importance)
    assert torch.equal(weight, before[0]) and torch.equal(importance, before[1])
