"""Weight and output errors equal sums over inputs that were captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch.objectives.damage import output_error as module
from bitsearch.objectives.damage.output_error import output_error, relative_output_error
from bitsearch.objectives.damage.weight_error import weight_error


def all_cells(case: Any, candidates: int = 2) -> list[tuple[int, int]]:
    return [(unit, c) for unit in range(len(case.units)) for c in range(candidates)]


def deltas(case: Any, scoring: Any, unit: int, candidate: int) -> list[tuple[Tensor, Tensor]]:
    """(W, Δ) of each matrix in float64."""
    found = []
    for matrix in case.units[unit].matrices:
        weight = scoring.weights.reference(matrix).double()
        rounded = scoring.weights.candidate(matrix, scoring.candidates[candidate]).double()
        found.append((weight, rounded - weight))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weight_error_is_the_squared_distance(family: str, case_of: Any) -> None:
    case = case_of(family)
    scoring = case.scoring()
    for unit, candidate, value in weight_error(scoring, all_cells(case, 3)):
        expected = sum(
            float(change.square().sum()) for _, change in deltas(case, scoring, unit, candidate)
        )
        assert expected > 0
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "qwen3_moe"])
def test_output_error_is_the_mean_squared_change(family: str, case_of: Any, captured: Any) -> None:
    case = case_of(family, dtype=torch.float64)
    scoring = case.scoring()
    plain = [
        index
        for index, unit in enumerate(case.units)
        if unit.kind in ("linear", "fused", "head") or unit.matrices[0].role == "experts.gate_up"
    ]
    cells = [(unit, candidate) for unit in plain for candidate in (0, 1)]
    modules = [m.module for unit in plain for m in case.units[unit].matrices]
    inputs = captured(case, modules)
    absolute = list(output_error(scoring, cells))
    relative = list(relative_output_error(scoring, cells))
    assert [cell[:2] for cell in absolute] == [cell[:2] for cell in relative] == cells
    for (unit, candidate, value), (_, _, ratio) in zip(absolute, relative, strict=True):
        error = size = 0.0
        parts = deltas(case, scoring, unit, candidate)
        for matrix, (weight, change) in zip(case.units[unit].matrices, parts, strict=True):
            x = inputs[matrix.module]
            error += float((x @ change.T).square().sum(-1).mean())
            size += float((x @ weight.T).square().sum(-1).mean())
        assert value == pytest.approx(error, rel=1e-4)
        assert ratio == pytest.approx(error / size, rel=1e-4)


def test_tied_embedding_counts_as_head(case_of: Any, captured: Any) -> None:
    case = case_of("gemma2", dtype=torch.float64)
    scoring = case.scoring()
    ((_, change),) = deltas(case, scoring, 0, 0)
    expected = (captured(case, ["lm_head"])["lm_head"] @ change.T).square().sum(-1).mean()
    ((_, _, value),) = output_error(scoring, [(0, 0)])
    assert value == pytest.approx(float(expected), rel=1e-4)


def test_unseen_inputs_give_the_weight_error(case_of: Any) -> None:
    """An untied embedding and down projections in experts, even square ones."""
    case = case_of("gpt_oss", intermediate_size=32)
    scoring = case.scoring()
    unseen = [
        (index, 0)
        for index, unit in enumerate(case.units)
        if unit.kind == "embedding" or unit.matrices[0].role == "experts.down"
    ]
    assert len(unseen) == 4
    weight = {cell[:2]: cell[2] for cell in weight_error(scoring, unseen)}
    size = {
        index: float(scoring.weights.reference(case.units[index].matrices[0]).square().sum())
        for index, _ in unseen
    }
    for unit, candidate, value in output_error(scoring, unseen):
        assert value == pytest.approx(weight[unit, candidate])
    for unit, candidate, value in relative_output_error(scoring, unseen):
        assert value == pytest.approx(weight[unit, candidate] / size[unit])


def test_little_memory_changes_nothing(case_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments are then gathered a unit at a time."""
    case = case_of()
    scoring = case.scoring()
    passes: list[int] = []
    gather = module.second_moments

    def counted(scoring: Any, units: Any) -> dict[int, Tensor]:
        passes.append(len(units))
        return gather(scoring, units)

    monkeypatch.setattr(module, "second_moments", counted)
    expected = list(output_error(scoring, all_cells(case)))
    assert passes == [len(case.units)]
    passes.clear()
    monkeypatch.setattr(module, "available_bytes", lambda device: 0)
    assert list(output_error(scoring, all_cells(case))) == expected
    assert passes == [1] * len(case.units)
