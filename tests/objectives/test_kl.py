"""The KL estimator equals two plain forward passes, for every kind of unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch.formats import parse_format
from bitsearch.objectives.damage.kl import kl, restart_block
from bitsearch.objectives.damage.scoring import Scoring
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.quantizers.quantized import Quantized
from bitsearch.quantizers.rtn import quantize


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral", "llama4_text"])
def test_equals_brute_force(family: str, case_of: Any) -> None:
    case = case_of(family, dtype=torch.float64, num_hidden_layers=2)
    scoring = case.scoring("int2-g16,int4-g16")
    cells = [(unit, candidate) for unit in range(len(case.units)) for candidate in (0, 1)]
    found = {(unit, candidate): value for unit, candidate, value in kl(scoring, cells)}
    assert found.keys() == set(cells)
    reference = case.log_probabilities()
    for (unit, candidate), value in found.items():
        for matrix in case.units[unit].matrices:
            parameter = case.model.get_parameter(matrix.name)
            original = parameter.clone()
            stored = original if original.dim() == 3 else original[None]
            for index, one in enumerate(stored):
                rows = one.T if matrix.transposed else one
                rounded = quantize(rows.float(), scoring.candidates[candidate]).dequantize()
                target = parameter[index] if original.dim() == 3 else parameter
                target.copy_(rounded.T if matrix.transposed else rounded)
            parameter._original = original
        changed = case.log_probabilities()
        for matrix in case.units[unit].matrices:
            parameter = case.model.get_parameter(matrix.name)
            parameter.copy_(parameter._original)
        expected = float((reference.exp() * (reference - changed)).sum(-1).mean())
        assert expected > 1e-6
        assert value == pytest.approx(expected, rel=1e-3, abs=2e-7)


def test_kinds_of_units_restart_where_they_are_first_used(case_of: Any) -> None:
    case = case_of()
    starts = {unit.kind: restart_block(unit, 3) for unit in case.units if unit.block in (None, 1)}
    assert starts == {"embedding": None, "fused": 1, "linear": 1, "head": 3}
    tied = case_of("gpt2")
    assert restart_block(tied.units[0], 3) is None


def test_weights_are_in_place_between_cells(case_of: Any) -> None:
    """Whoever stops early finds the model as it was."""
    case = case_of()
    before = case.state()
    for _ in kl(case.scoring(), [(0, 0), (1, 0), (1, 1)]):
        assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())


def test_overflow_is_infinite_damage(case_of: Any) -> None:
    """Not zero, which would make it everybody's first choice."""
    case = case_of(dtype=torch.float16)

    def explosive(weight: Tensor, format: Any, importance: Any) -> Quantized:
        found = quantize(weight, format, importance)
        return Quantized(format, found.codes, torch.full_like(found.scales, 6e4), found.zeros)

    formats = [parse_format("int4-g16"), parse_format("bf16")]
    weights = CandidateWeights(case.model, explosive, {}, 1 << 20)
    scoring = Scoring(case.decoder, case.units, formats, weights, case.tokens, 0)
    last = len(case.units) - 1
    values = {(u, c): v for u, c, v in kl(scoring, [(1, 0), (1, 1), (last, 0)])}
    assert values[1, 0] == math.inf and values[last, 0] == math.inf
    assert 0 <= values[1, 1] < 0.1
