"""Codebooks of a row: what k-means promises, and bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format
from bitsearch.quantizers import codebook
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.feedback import output_errors
from bitsearch.quantizers.gptq import quantize as gptq
from bitsearch.quantizers.rtn import quantize
from bitsearch.quantizers.second_moment import SecondMoment

NAMES = ["lut2-row", "lut3-row", "lut4-row"]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def losses(weight: Tensor, values: Tensor, h: Tensor) -> Tensor:
    """(rows,) Σ h (w − ŵ)²."""
    return ((values - weight).double().square() * h.double()).sum(1)


def nearest_of(weight: Tensor, entries: Tensor) -> Tensor:
    """Each weight's nearest entry of its row."""
    place = (weight[:, :, None] - entries[:, None]).abs().argmin(-1)
    return entries.gather(1, place)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    heavy_tailed=st.booleans(),
)
def test_no_worse_than_quantiles_or_even_levels(
    name: str, rows: int, columns: int, seed: int, heavy_tailed: bool
) -> None:
    format, weight, h = parse_format(name), normal(rows, columns, seed), normal(1, columns, 1)[0]
    weight, h = weight.pow(3) if heavy_tailed else weight, h.square()
    count = 2**format.bits
    found = losses(weight, quantize(weight, format, h).dequantize(), h)
    shares = (torch.arange(count) + 0.5) / count
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    order = weight.argsort(1)
    mass = h[order].cumsum(1)
    place = torch.searchsorted(mass, mass[:, -1:] * shares).clamp(max=columns - 1)
    # float16 entries: relative 2^-11 of each weight
    slack = 1e-6 * (weight.double().square() * h).sum(1) + 1e-12
    for start in (low + (high - low) * shares, weight.gather(1, order).gather(1, place)):
        assert bool((found <= losses(weight, nearest_of(weight, start), h) + slack).all())


def test_more_steps_never_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = normal(16, 500).pow(3), normal(1, 500, 1)[0].square()
    found = []
    for steps in (0, 1, 2, 4, 8, 16, 100):
        monkeypatch.setattr(codebook, "_STEPS", steps)
        found.append(losses(weight, quantize(weight, parse_format("lut3-row"), h).dequantize(), h))
    for before, after in pairwise(found):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(found[-1].sum()) < 0.9 * float(found[0].sum())


def optimum(row: Tensor, h: Tensor, count: int) -> float:
    """Least loss over all cuts of the sorted row, by dynamic programming."""
    row, order = row.double().sort()
    h = h.double()[order]
    size = len(row)

    def cost(start: int, end: int) -> float:
        part, mass = row[start:end], h[start:end]
        return float((mass * (part - (mass * part).sum() / mass.sum()).square()).sum())

    best = [0.0] + [cost(0, end) for end in range(1, size + 1)]
    for _ in range(count - 1):
        best = [0.0] + [
            min(best[start] + cost(start, end) for start in range(end))
            for end in range(1, size + 1)
        ]
    return best[-1]


def test_close_to_the_best_codebook() -> None:
    weight, h = normal(8, 24, 3), normal(1, 24, 4)[0].square() + 0.01
    found = losses(weight, quantize(weight, parse_format("lut2-row"), h).dequantize(), h)
    best = torch.tensor([optimum(row, h, 4) for row in weight]).double()
    ratio = found / best
    assert bool((ratio > 0.999).all()) and float(ratio.median()) < 1.1 and float(ratio.max()) < 2


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_weights_reach_the_quantizer_of_lloyd_and_max(
    bits: int, distortion: float
) -> None:
    """Known optima of 4, 8 and 16 levels; a table fitted to 4096 weights does a little better."""
    weight = normal(64, 4096, bits)
    error = (quantize(weight, parse_format(f"lut{bits}-row")).dequantize() - weight).square()
    assert float(error.sum() / weight.square().sum()) == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [1, 3, 50])
def test_few_different_weights_are_kept(name: str, columns: int) -> None:
    """However unevenly they are spread, and whatever their importance."""
    format, rng = parse_format(name), torch.Generator().manual_seed(0)
    values = torch.randn(9, 2**format.bits, generator=rng).pow(5).half().float()
    which = torch.randint(2**format.bits, (9, columns), generator=rng)
    which[:, columns // 3 :] %= 2
    weight, h = values.gather(1, which), torch.rand(columns, generator=rng).pow(8)
    assert torch.equal(quantize(weight, format, h).dequantize(), weight)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(rows=st.integers(1, 3), columns=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    name: str, rows: int, columns: int, seed: int
) -> None:
    format = parse_format(name)
    encoded = quantize(normal(rows, columns, seed), format)
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(rows, columns)
    back = codec_of(format).unpack(packed, format, columns)
    assert torch.equal(back.dequantize(), encoded.dequantize())


def test_bytes_by_hand() -> None:
    """3 bits of 13 weights are 39 bits, so 5 bytes; 8 entries of 2 bytes."""
    assert parse_format("lut3-row").bytes(10, 13) == 10 * (5 + 16)
    for name in ("lut1-row", "lut5-row", "lut3", "lut3-g64"):
        with pytest.raises(UsageError):
            parse_format(name)


def test_importance_moves_the_error_to_other_columns() -> None:
    weight, h = normal(32, 256, 5), torch.where(torch.arange(256) % 8 == 0, 100.0, 1.0)
    format, one = parse_format("lut3-row"), torch.ones(256)
    aware, blind = quantize(weight, format, h).dequantize(), quantize(weight, format).dequantize()
    assert losses(weight, aware, h).sum() < 0.8 * losses(weight, blind, h).sum()
    assert losses(weight, blind, one).sum() < losses(weight, aware, one).sum()
    none = quantize(weight, format, torch.zeros(256)).dequantize()
    assert torch.equal(none, blind)


def test_gptq_rounds_into_codebooks() -> None:
    inputs = normal(600, 96, 6) @ (normal(96, 96, 7) * torch.logspace(0, -2, 96)[:, None])
    second = SecondMoment(inputs.mT @ inputs / 600)
    weight, format = normal(32, 96, 8), parse_format("lut3-row")
    plain = quantize(weight, format, second.matrix.diagonal())
    found = gptq(weight, format, second.matrix.diagonal(), second)
    assert torch.equal(found.pack()["entries"], plain.pack()["entries"])
    after, before = (output_errors(weight, each, second) for each in (found, plain))
    assert bool((after <= before).all()) and float(after.sum()) < 0.5 * float(before.sum())


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(BadInput, match=r"beyond float16.*--freeze"):
        quantize(normal(2, 20) * 1e5, parse_format("lut3-row"))
