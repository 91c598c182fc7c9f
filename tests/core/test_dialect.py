"""BlockDialect's format and both ways to choose a dialect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format
from bitsearch.formats.dialect import DIALECT4, DIALECTS
from bitsearch.quantizers.dialect import lookup, quantize, unpack


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_block_by_hand() -> None:
    """Largest weight 5.5: float16 exponent 2, so that a half unit is 2^(2−2)/2 = 0.5.

    In halves: 11, −4.4, 6.9, 0.4. Dialects 8 (…, 6, 9, 11) and 9 (…, 6, 7, 11) end at 11.
    One weight (6.9) lies in 6.5–8, where 7 is nearest; none in 8–10, where 9 is: dialect 9.
    """
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([11, -4.4, 6.9, 0.4]) / 2
    for found in (quantize(weight, DIALECT4), lookup(weight, DIALECT4)):
        assert found.dequantize()[0, :5].tolist() == [5.5, -2.0, 3.5, 0.0, 0.0]
    found = quantize(weight, DIALECT4)
    assert found.exponents.tolist() == [[17]]
    # 9 bits: dialect 9 = 1001, exponent 17 = 10001, low bit first.
    assert found.pack()["blocks"].tolist() == [[0b00011001, 0b1]]
    assert found.pack()["codes"][0, :2].tolist() == [7 | (4 | 8) << 4, 6 | 0 << 4]


def test_every_block_takes_the_dialect_of_least_error() -> None:
    weight = normal(6, 96, 0)
    values = quantize(weight, DIALECT4).dequantize()
    for block, found in zip(
        weight.reshape(-1, 32).tolist(), values.reshape(-1, 32).tolist(), strict=True
    ):
        peak = max(map(abs, block))
        unit = 2.0 ** (int(torch.frexp(torch.tensor(peak)).exponent) - 4)
        errors = [
            sum(min((abs(w) - m * unit) ** 2 for m in dialect) for w in block)
            for dialect in DIALECTS
        ]
        error = sum((w - v) ** 2 for w, v in zip(block, found, strict=True))
        assert error == pytest.approx(min(errors), rel=1e-4)


def test_the_look_up_is_near_the_least_error_and_below_mxfp4() -> None:
    """The paper: within 0.04 perplexity of the full search; far below MXFP4."""
    weight = normal(64, 1024, 1)

    def error(found: torch.Tensor) -> float:
        return float((found - weight).square().mean())

    least = error(quantize(weight, DIALECT4).dequantize())
    looked_up = error(lookup(weight, DIALECT4).dequantize())
    assert least <= looked_up < 1.15 * least
    assert looked_up < 0.0133


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    rows: int, columns: int, seed: int
) -> None:
    found = quantize(normal(rows, columns, seed) * 10.0 ** (seed % 7 - 4), DIALECT4)
    packed = found.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == DIALECT4.bytes(rows, columns)
    back = unpack(packed, DIALECT4, columns)
    assert torch.equal(back.dequantize(), found.dequantize())
    again = quantize(found.dequantize(), DIALECT4)
    assert torch.equal(again.dequantize(), found.dequantize())


def test_bits_of_a_weight() -> None:
    assert parse_format("dialect4-b32").bytes(1, 4096) * 8 / 4096 == 4 + 9 / 32


def test_what_has_no_dialects_is_refused() -> None:
    with pytest.raises(UsageError, match="dialect_lookup"):
        lookup(normal(1, 32, 0), parse_format("int4-g32"))
    with pytest.raises(BadInput, match="beyond float16"):
        quantize(torch.full((1, 32), 1e5), DIALECT4)
