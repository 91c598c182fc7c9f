"""GPTQ: never worse than rounding, and what the method says it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsearch.errors import UsageError
from bitsearch.formats import parse_format
from bitsearch.quantizers import QUANTIZERS, load_quantizer, needs_second_moments
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.feedback import output_errors
from bitsearch.quantizers.gptq import quantize
from bitsearch.quantizers.rtn import quantize as rtn
from bitsearch.quantizers.second_moment import SecondMoment

NAMES = [
    "int4-g32", "int3-g16-sym", "int2-row", "int8-g32", "int3-g16-fz", "nf3-g16", "mxfp4", "nvfp4",
    "fp8", "dialect4-b32", "int3-g16-s3",
]  # fmt: skip


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, tokens: int, seed: int) -> Tensor:
    """G of inputs whose columns hang together and differ in size."""
    mixing = normal(columns, columns, seed) * torch.logspace(0, -2, columns)[:, None]
    inputs = normal(tokens, columns, seed + 1) @ mixing
    return inputs.mT @ inputs / tokens


def rounded(weight: Tensor, name: str, moment: Tensor) -> tuple[Any, Any, SecondMoment]:
    """With and without feedback, both with the same scales."""
    format, second = parse_format(name), SecondMoment(moment)
    h = moment.diagonal()
    return quantize(weight, format, h, second), rtn(weight, format, h), second


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 150),
    tokens=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_no_row_is_worse_than_rounded_to_nearest(
    name: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    """Also with fewer tokens than columns, where G is singular."""
    weight, moment = normal(rows, columns, seed), correlated(columns, tokens, seed + 1)
    found, plain, _ = rounded(weight, name, moment)
    after, before = (
        ((encoded.dequantize() - weight).double() @ moment.double())
        .mul((encoded.dequantize() - weight).double())
        .sum(1)
        for encoded in (found, plain)
    )
    slack = 1e-6 * float(moment.diagonal().mean()) * weight.double().square().sum(1)
    assert bool((after <= before + slack).all())


@pytest.mark.parametrize(
    ("name", "share"),
    [("int3-g32", 0.5), ("int3-g32-fz", 0.5), ("int4-g32", 0.5), ("nf3-g32", 0.5), ("mxfp4", 0.5)],
)
def test_correlated_inputs_lose_much_less(name: str, share: float) -> None:
    weight, moment = normal(64, 256, 0), correlated(256, 1024, 1)
    found, plain, second = rounded(weight, name, moment)
    gained = output_errors(weight, found, second).sum() / output_errors(weight, plain, second).sum()
    assert float(gained) < share


@pytest.mark.parametrize("name", NAMES)
def test_independent_inputs_are_rounded_to_nearest(name: str) -> None:
    weight = normal(8, 200, 2)
    moment = torch.diag(torch.rand(200, generator=torch.Generator().manual_seed(3)))
    found, plain, _ = rounded(weight, name, moment)
    assert torch.equal(found.dequantize(), plain.dequantize())


def textbook(weight: Tensor, plain: Any, name: str, moment: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order, with an inverse at each step.

    After column q of the columns F that are left, with H = G + λI restricted to F:
    δ_F = −(w_q − ŵ_q) / [H⁻¹]_qq · [H⁻¹]_:,q (GPTQ, equation 2).
    """
    h = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(
        len(moment), dtype=torch.float64
    )
    nearest = codec_of(parse_format(name)).nearest
    assert nearest is not None
    left, values = weight.double().clone(), torch.empty_like(weight)
    columns = sorted(range(len(moment)), key=lambda column: -float(moment[column, column]))
    for place, column in enumerate(columns):
        free = torch.tensor(columns[place:])
        inverse = torch.linalg.inv(h[free][:, free])
        values[:, column] = nearest(plain, left[:, column].float(), column)[1]
        error = (left[:, column] - values[:, column].double()) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0]
    return values


@pytest.mark.parametrize("name", ["int3-g16", "int4-row-sym", "nf4-g16", "mxfp4", "dialect4-b32"])
@pytest.mark.parametrize("columns", [33, 150])
def test_the_published_update_column_by_column(name: str, columns: int) -> None:
    """More columns than a block of lazy updates, and a last group that is shorter."""
    weight, moment = normal(5, columns, 4), correlated(columns, 400, 5)
    found, plain, second = rounded(weight, name, moment)
    expected = textbook(weight, plain, name, moment)
    errors = (expected - weight) @ moment * (expected - weight)
    better = errors.sum(1) < output_errors(weight, plain, second)
    assert bool(better.any())
    values = torch.where(better[:, None], expected, plain.dequantize())
    torch.testing.assert_close(found.dequantize(), values, rtol=1e-5, atol=1e-6)


def test_factor_is_that_of_the_damped_inverse() -> None:
    moment = correlated(60, 100, 6)
    order, upper = SecondMoment(moment).feedback
    assert bool((moment.diagonal()[order].diff() <= 0).all())
    assert torch.equal(upper, upper.triu())
    damped = moment[order][:, order].double()
    damped.diagonal().add_(0.01 * float(moment.diagonal().mean()))
    product = upper.double().mT @ upper.double() @ damped
    torch.testing.assert_close(product, torch.eye(60).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_stored_as_rounded_weights_are(name: str) -> None:
    format, weight = parse_format(name), normal(7, 150, 7)
    found, plain, _ = rounded(weight, name, correlated(150, 300, 8))
    packed = found.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(7, 150)
    assert torch.equal(
        codec_of(format).unpack(packed, format, 150).dequantize(), found.dequantize()
    )
    for part, stored in plain.pack().items():
        assert part == "codes" or torch.equal(packed[part], stored)


def test_again_is_the_same_and_leaves_its_input_alone() -> None:
    weight, moment = normal(16, 96, 9), correlated(96, 200, 10)
    before = weight.clone(), moment.clone()
    found = [rounded(weight, "int3-g32", moment)[0].codes for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])


def test_columns_without_input_stay_where_they_are() -> None:
    weight, moment = normal(8, 64, 11), correlated(64, 200, 12)
    moment[::3], moment[:, ::3] = 0.0, 0.0
    found, plain, _ = rounded(weight, "int3-g16", moment)
    assert torch.equal(found.codes[:, ::3], plain.codes[:, ::3])
    assert not torch.equal(found.codes, plain.codes)


def test_unseen_inputs_are_rounded_to_nearest() -> None:
    weight, format, h = normal(8, 64, 13), parse_format("int3-g16"), torch.rand(64)
    assert torch.equal(quantize(weight, format, h).codes, rtn(weight, format, h).codes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("moment", [None, torch.eye(256)])
def test_a_format_without_scales_of_its_own_is_refused(moment: Tensor | None) -> None:
    with pytest.raises(UsageError, match="'gptq' cannot round into gguf-q4_k"):
        quantize(
            normal(4, 256, 14),
            parse_format("gguf-q4_k"),
            None,
            None if moment is None else SecondMoment(moment),
        )


def test_only_quantizers_that_ask_are_given_second_moments() -> None:
    asking = [name for name in QUANTIZERS if needs_second_moments(load_quantizer(name))]
    assert asking == ["gptq"]
