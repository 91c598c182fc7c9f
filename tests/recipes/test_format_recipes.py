"""The rules of systems that are known for their formats, on cases worked out by hand.

Where a rule looks at what rounding loses, the rounding is put in its place here: to whole
numbers, or to the two ends of a group's range. The quantizers themselves are checked in
tests/core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitsearch.formats import parse_format, parse_formats
from bitsearch.objectives.damage import fisher_weight, outlier_features
from bitsearch.preparations.resq import principal_last
from bitsearch.quantizers import columns, gptq, halves, sparse
from bitsearch.quantizers.codec import Codec
from bitsearch.quantizers.columns import Columns
from bitsearch.quantizers.rtn import quantize
from bitsearch.quantizers.second_moment import SecondMoment
from bitsearch.recipes import load_recipe

Known = Callable[..., Any]
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Values:
    """What weights are rounded to."""

    codes: Tensor

    def dequantize(self) -> Tensor:
        return self.codes.clone()


def rounding(monkeypatch: Patch, module: Any, to: Callable[[Tensor], Tensor]) -> None:
    """Let a base format round so."""
    base = Codec(lambda weight, format, h: Values(to(weight)), lambda *_: Values(torch.empty(0)))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(module, "codec_of", lambda f: halves.CODEC if f.exact else base)


def test_owq(monkeypatch: Patch) -> None:
    """λ_j = G_jj ‖Δw_j‖² with whole numbers: Δ = (.4, −.3), (0, .1), (.3, .2), (−.1, 0).

    ‖Δ‖² = .25, .01, .13, .01; times G_jj = 1, 9, 2, 30: .25, .09, .26, .30. Two columns: the
    last and the third, though the first loses most by itself.
    """
    rounding(monkeypatch, columns, torch.round)
    weight = torch.tensor([[0.6, 1.0, 1.7, 2.1], [2.3, 0.9, -0.2, 1.0]])
    h = torch.tensor([1.0, 9.0, 2.0, 30.0])
    found = columns.quantize(weight, parse_format("int3-row+fp16x2"), h)  # type: ignore[arg-type]
    assert found.columns.tolist() == [2, 3]
    recipe = load_recipe("owq")
    assert recipe.quantizer == "gptq" and "int3-row+fp16x1%" in names("owq")


def names(recipe: str) -> list[str]:
    """A recipe's candidates."""
    return [format.name for format in parse_formats(str(load_recipe(recipe).candidates))]


@pytest.mark.parametrize(
    ("name", "columns_", "row"),
    [("atom", 128, 3968 // 2 + 2 * 31 + 128 + 2), ("quik", 256, 3840 // 2 + 2 + 2 * 256)],
)
def test_atom_and_quik_keep_what_the_papers_keep_of_4096(
    name: str, columns_: int, row: int
) -> None:
    """Atom: 128 in 8 bits with a scale, 31 groups of 128 in 4. QUIK: 256 in 16 bits, one scale."""
    format = parse_format(names(name)[0])
    assert format.bytes(4096, 4096) == 4096 * row + 2 * columns_


def test_atom_takes_the_largest_energy_where_all_lose_alike(monkeypatch: Patch) -> None:
    rounding(monkeypatch, columns, lambda weight: weight + 0.25)
    weight, h = torch.zeros(2, 5), torch.tensor([3.0, 8.0, 1.0, 9.0, 4.0])
    found = columns.quantize(weight, parse_format("int4-g128-sym+fp16x2"), h)  # type: ignore[arg-type]
    assert found.columns.tolist() == [1, 3]


def test_quik_leaves_the_errors_to_the_kept_columns() -> None:
    """Two inputs that are always equal: the kept weight makes up for all that the other loses."""
    weight = torch.tensor([[0.7, 0.2]]).repeat(4, 1) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    moment = SecondMoment(torch.tensor([[1.0, 1.0], [1.0, 1.0001]]))
    format = parse_format("int2-row-sym+fp16x1")
    found = gptq.quantize(weight, format, moment.matrix.diagonal(), moment)
    assert isinstance(found, Columns)
    lost = found.dequantize() - weight
    kept = int(found.columns[0])
    torch.testing.assert_close(lost[:, kept], -lost[:, 1 - kept], rtol=0.02, atol=2e-3)


def test_spqr(monkeypatch: Patch) -> None:
    """Levels are the two ends of the group, 0 among them.

    (2, 3, 8, 0) → (0, 0, 8, 0): 4 + 9 = 13. Without 8 the levels are 0 and 3: (3, 3, –, 0), 1;
    so leaving 8 out gains 12, though 8 itself is exact. 3 loses 9, 2 loses 4.
    """

    def ends(weight: Tensor) -> Tensor:
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True)
        return torch.where((weight - low) < (high - weight), low, high)

    rounding(monkeypatch, sparse, ends)
    weight, one = torch.tensor([[2.0, 3.0, 8.0, 0.0]]), torch.ones(4)
    for share, places in (("25%", [2]), ("50%", [1, 2])):
        format: Any = parse_format(f"int3-g16-s3+sparse{share}")
        assert sparse.quantize(weight, format, one).places.tolist() == places
    # (2, 3, 1, 0) weighs the error of the first column nine times: 9 · 1 against 1 · 1
    format = parse_format("int3-g16-s3+sparse25%")
    weight, h = torch.tensor([[2.0, 3.0, 1.0, 0.0]]), torch.tensor([9.0, 1.0, 1.0, 1.0])
    assert sparse.quantize(weight, format, h).places.tolist() == [0]
    assert "int3-g16-s3+sparse1%" in names("spqr")


def test_spqr_bits() -> None:
    """Section 4: groups of 16, 3 bits, statistics in 3 bits, two 16-bit pairs for 256 weights;
    32 bits an outlier.
    """
    row = 3 * 4096 + 2 * 3 * 256 + 4 * 16 * 16
    assert parse_format("int3-g16-s3").bytes(1, 4096) * 8 == row
    outliers = 41  # 1 % of 4096
    assert parse_format("int3-g16-s3+sparse1%").bytes(1, 4096) * 8 == row + 32 * outliers + 64


def test_squeezellm(monkeypatch: Patch) -> None:
    """Two of four weights: one by size, 5.4; one by h (w − ŵ)²: .09, 10 · .16, .04, so 1.4."""
    rounding(monkeypatch, sparse, torch.round)
    weight, h = torch.tensor([[5.4, 3.3, 1.4, 0.2]]), torch.tensor([1.0, 1.0, 10.0, 1.0])
    format: Any = parse_format("int3-row+sparse50%")
    assert sparse.quantize(weight, format, h).places.tolist() == [0, 2]


def test_squeezellm_tables() -> None:
    """Four entries for five weights: one pair shares an entry, at its weighted mean.

    h = 4, 1, 4, 3, 1: joining 0 and 1, or 1 and 2, costs 4·1/5 = .8; 10 and 11 cost 3·1/4 = .75
    and meet at 10.25.
    """
    weight, h = torch.tensor([[0.0, 1.0, 2.0, 10.0, 11.0]]), torch.tensor([4.0, 1.0, 4.0, 3.0, 1.0])
    found = quantize(weight, parse_format("lut2-row"), h).dequantize()
    assert found.tolist() == [[0.0, 1.0, 2.0, 10.25, 10.25]]


def test_llm_int8(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """Largest inputs 5.9, 6, 7 of a and 1, −8, 2 of b, 2 and 1 rows; columns kept as said.

    a: 2 rows × 2 features = 4 without any, 2 with column 1, 0 with 1 and 2. b: 1, 1 with
    column 0 (which is none), 0 with 0 and 1. At 3, 4 and 5 bytes: 8 bytes take a to 5 and b to
    3, damage 1; 9 do not help b, 10 leave nothing out.
    """
    formats = "int8-row-sym,int8-row-sym+fp16x1,int8-row-sym+fp16x2"
    scoring = known(formats, {"a": [[0.0] * 3] * 3, "b": [[0.0] * 3] * 3})
    a, b = scoring.units
    rows = {"a": 2, "b": 1}
    scoring.units = [
        SimpleNamespace(
            name=u.name, matrices=[SimpleNamespace(name=u.name, out_features=rows[u.name])]
        )
        for u in (a, b)
    ]
    kept = {"a": [[], [1], [1, 2]], "b": [[], [0], [0, 1]]}

    def quantized(matrix: Any, format: Any) -> tuple[Any, ...]:
        own = kept[matrix.name][scoring.candidates.index(format)]
        others = [column for column in range(3) if column not in own]
        part = SimpleNamespace(codes=torch.empty(1, len(own)), format=parse_format("fp16"))
        return (Columns(format, torch.tensor(others + own), None, part),)

    class Seen:
        def __init__(self, decoder: Any, units: Any, see: Any) -> None:
            see(a, torch.tensor([[5.9, -6.0, 1.0], [0.0, 2.0, 7.0]]))
            see(b, torch.tensor([[1.0, -8.0, 2.0]]))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    scoring.weights.quantized = quantized
    monkeypatch.setattr(outlier_features, "observed", Seen)
    monkeypatch.setattr(outlier_features, "run_through", lambda *_: None)
    damage = table("llm-int8", scoring)
    assert damage == pytest.approx(np.array([[4.0, 2.0, 0.0], [1.0, 1.0, 0.0]]), abs=1e-30)
    costs = [[3, 4, 5], [3, 4, 5]]
    assert chosen("llm-int8", damage, costs, 8) == [2, 0]
    assert chosen("llm-int8", damage, costs, 10) == [2, 2]


def test_resq() -> None:
    """G = ((5, 4), (4, 5)): (1, −1)/√2 with 1 comes first, (1, 1)/√2 with 9 is kept."""
    assert load_recipe("resq").prepare == "resq" and "int4-row-sym+int8x12.5%" in names("resq")
    moment = torch.tensor([[5.0, 4.0], [4.0, 5.0]])
    basis = principal_last(moment, torch.Generator().manual_seed(0))
    half = 0.5**0.5
    torch.testing.assert_close(basis.abs(), torch.full((2, 2), half))
    assert float(basis[0, 0] * basis[1, 0]) < 0 < float(basis[0, 1] * basis[1, 1])
    energy = (basis.mT @ moment @ basis).diagonal()
    torch.testing.assert_close(energy, torch.tensor([1.0, 9.0]))
    # 4 bits and a scale for 7/8 of a row, 8 bits and a scale for the rest, indices
    bits = 4 * 3584 + 16 + 8 * 512 + 16
    format = parse_format("int4-row-sym+int8x12.5%")
    assert format.bytes(4096, 4096) * 8 == 4096 * bits + 16 * 512


def test_blockdialect(chosen: Any) -> None:
    """Magnitudes of two dialects, in halves: (…, 6, 11, 15) and (…, 6, 7, 10), each exact.

    What a budget leaves over goes where the squared error is largest.
    """
    one = torch.tensor([0, 1, 2, 3, 4, 6, 11, 15] * 4) / 2
    other = torch.tensor([0, 1, 2, 3, 4, 6, 7, 10] * 4) / 2
    weight = torch.stack([one, -other])
    assert torch.equal(quantize(weight, parse_format("dialect4-b32")).dequantize(), weight)
    damage = [[0.3, 0.0], [0.5, 0.0], [0.1, 0.0]]
    assert chosen("blockdialect", np.array(damage), [[1, 4]] * 3, 8) == [0, 1, 0]


def test_mofq(known: Known, table: Any, chosen: Any) -> None:
    """Σ Δ²: a .3² + .4² = .25 as integer, .6² = .36 as float; b 1 and .5; both fit, so a is an
    integer and b a float. At 8 bits c loses .01 and .04.
    """
    errors = {
        "a": [[0.3, 0.4], [0.0, 0.0], [0.6, 0.0], [0.0, 0.1]],
        "b": [[1.0, 0.0], [0.1, 0.0], [0.5, 0.5], [0.1, 0.1]],
    }
    damage = table("mofq", known("int{4,8}-row-sym,fp{4,8}", errors))
    assert damage == pytest.approx(np.array([[0.25, 0.0, 0.36, 0.01], [1.0, 0.01, 0.5, 0.02]]))
    costs = [[4, 8, 5, 9]] * 2
    assert chosen("mofq", damage, costs, 9) == [0, 2]
    assert chosen("mofq", damage, costs, 12) == [0, 1]


def test_fgmp(known: Known, monkeypatch: Patch, table: Any, chosen: Any) -> None:
    """Σ F (Q₄ − Q₈)² over 2 · 4 tokens, not Σ F Δ₄².

    a: F = (1, 4), Δ₄ = (.5, .2), Δ₈ = (.1, .2): .16 / 8 = .02, though Σ F Δ₄² = .41. b: F = 2,
    Δ₄ = .3, Δ₈ = −.1: .32 / 8 = .04. One unit at 8 bits is b.
    """
    scoring = known("nvfp4,fp8", {"a": [[0.5, 0.2], [0.1, 0.2]], "b": [[0.3, 0.0], [-0.1, 0.0]]})
    scoring.weights.candidate = lambda matrix, format: scoring.error(
        matrix, scoring.candidates.index(format)
    )
    diagonal = {"a.weight": torch.tensor([[1.0, 4.0]]), "b.weight": torch.tensor([[2.0, 1.0]])}
    monkeypatch.setattr(fisher_weight, "_diagonal", lambda *_: diagonal)
    monkeypatch.setattr(fisher_weight, "widest_candidate", lambda _: 1)
    damage = table("fgmp", scoring)
    assert damage == pytest.approx(np.array([[0.02, 0.0], [0.04, 0.0]]))
    assert chosen("fgmp", damage, [[4, 8]] * 2, 12) == [0, 1]
