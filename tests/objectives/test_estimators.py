"""What every registered estimator owes its callers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bitsearch.errors import UsageError
from bitsearch.objectives.damage import hessian_eigenvalue, hessian_trace
from bitsearch.objectives.estimators import ESTIMATORS, load_estimator

FAMILIES = ["llama", "gpt2", "mixtral"]
DRAWN = {
    "fisher_output",
    "fisher_weight",
    "fisher_weight_from_widest",
    "hessian_eigenvalue",
    "hessian_eigenvalue_ranking",
    "hessian_trace",
    "noise_slope",
}
# Measured from the widest candidate, which so does no damage.
RELATIVE = {
    "fisher_weight_from_widest",
    "gradient_alignment",
    "hessian_input_activation",
    "weight_quantization_error",
}


BLIND = {"outlier_features"}  # to widths


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell whether results repeat."""
    monkeypatch.setattr(hessian_trace, "DRAWS", 2)
    monkeypatch.setattr(hessian_eigenvalue, "ITERATIONS", 2)
    monkeypatch.setattr(hessian_eigenvalue, "WINDOWS", 1)


@pytest.fixture(params=ESTIMATORS)
def name(request: pytest.FixtureRequest) -> str:
    """Every estimator's name in turn."""
    return str(request.param)


@pytest.fixture
def estimator(name: str) -> Any:
    """Every estimator in turn."""
    return load_estimator(name)


def small(case_of: Any, family: str) -> Any:
    return case_of(family, num_hidden_layers=2, windows=2)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown estimator 'vibes'; known: kl"):
        load_estimator("vibes")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_once_and_nothing_else(estimator: Any, family: str, case_of: Any) -> None:
    """Finite, not negative, whatever the order in which cells are asked for."""
    case = small(case_of, family)
    cells = [(unit, c) for unit in range(len(case.units)) for c in range(3)]
    found = list(estimator(case.scoring(), cells[::-1]))
    assert sorted(cell[:2] for cell in found) == cells
    assert all(math.isfinite(value) and value >= 0 for _, _, value in found)
    assert any(value > 0 for _, _, value in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_does_not_depend_on_the_others(estimator: Any, family: str, case_of: Any) -> None:
    """So that a resumed table is the same as one measured at once."""
    case = small(case_of, family)
    cells = [(unit, c) for unit in range(len(case.units)) for c in range(3)]
    whole = {cell[:2]: cell[2] for cell in estimator(case.scoring(), cells)}
    first = cells[: len(cells) // 2]
    for part in (first, cells[len(first) :], [cells[4]], [cells[-1]]):
        for unit, candidate, value in estimator(case.scoring(), part):
            assert value == pytest.approx(whole[unit, candidate], rel=1e-6, abs=1e-12)


def test_results_repeat_under_a_seed(name: str, case_of: Any) -> None:
    """And change with it only where something is drawn."""
    case = small(case_of, "llama")
    cells = [(unit, 0) for unit in range(len(case.units))]
    one, same, other = (
        list(load_estimator(name)(case.scoring(seed=seed), cells)) for seed in (0, 0, 1)
    )
    assert one == same
    assert (one != other) == (name in DRAWN)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(estimator: Any, family: str, case_of: Any) -> None:
    """After every cell, and when the caller stops early."""
    case = small(case_of, family)
    before = case.state()
    logits = case.log_probabilities()

    def untouched() -> bool:
        return all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())

    cells = [(unit, 0) for unit in range(len(case.units))]
    for count, _ in enumerate(estimator(case.scoring(), cells)):
        assert untouched()
        if count == 3:
            break
    assert untouched()
    assert not any(p.requires_grad or p.grad is not None for p in case.model.parameters())
    assert torch.equal(case.log_probabilities(), logits)


def test_unchanged_weights_do_no_damage(estimator: Any, case_of: Any) -> None:
    """A bfloat16 model loses nothing in bf16."""
    case = case_of(dtype=torch.bfloat16, num_hidden_layers=2, windows=2)
    cells = [(unit, 2) for unit in range(len(case.units))]
    assert all(value < 1e-6 for _, _, value in estimator(case.scoring(), cells))


def test_more_bits_do_less_damage(name: str, estimator: Any, case_of: Any) -> None:
    """Two bits against six, summed over the model."""
    case = case_of(num_hidden_layers=2)
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    sums = [0.0, 0.0]
    for _, candidate, value in estimator(case.scoring("int2-g16,int6-g16"), cells):
        sums[candidate] += value
    if name in BLIND:
        assert sums[0] == sums[1] > 0
        return
    assert sums[0] > 5 * sums[1] >= 0
    assert (sums[1] == 0) == (name in RELATIVE)
