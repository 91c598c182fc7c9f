"""The weight-side Fisher diagonal: same labels, and expectation over labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitsearch.objectives.damage.fisher_weight import fisher_weight, fisher_weight_from_widest
from bitsearch.objectives.damage.gradients import sample


def rows_of(stored: Tensor, matrix: Any) -> Tensor:
    """(count·out, in) rows of a stored tensor."""
    return (stored.mT if matrix.transposed else stored).reshape(-1, matrix.in_features)


def test_labels_follow_the_predictions() -> None:
    """Frequencies of 200000 draws lie within 5 standard errors of the softmax."""
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0, -30.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    draws = 200_000
    for row in logits:
        drawn = sample(row.expand(draws, -1), torch.Generator().manual_seed(1))
        found = torch.bincount(drawn, minlength=5) / draws
        p = row.double().softmax(-1)
        assert torch.all((found - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-9)


def test_labels_repeat_with_their_generator() -> None:
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    one, same, other = (sample(logits, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.min() >= 0 and one.max() < 50


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_equals_per_window_gradients(family: str, case_of: Any) -> None:
    case = case_of(family, dtype=torch.float64, num_hidden_layers=2)
    scoring = case.scoring(seed=7)
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    found = {(unit, c): value for unit, c, value in fisher_weight(scoring, cells)}
    matrices = {m.name: m for unit in case.units for m in unit.matrices}
    case.model.requires_grad_(True)
    squares = {name: torch.zeros(()).double() for name in matrices}
    for index, window in enumerate(case.tokens):
        logits = case.model(input_ids=window[None]).logits[0]
        labels = sample(logits.float(), scoring.generator(index))
        case.model.zero_grad()
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for name in matrices:
            squares[name] = squares[name] + case.model.get_parameter(name).grad.square()
    case.model.requires_grad_(False)
    windows, length = case.tokens.shape
    for (unit, c), value in found.items():
        expected = 0.0
        for matrix in case.units[unit].matrices:
            change = scoring.error(matrix, c).double()
            mean = rows_of(squares[matrix.name], matrix) / windows
            expected += float((mean * change.square()).sum()) / (2 * length)
        assert expected > 0
        assert value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_expectation_is_the_exact_fisher_information(family: str, minute: Any) -> None:
    """Over 300 draws of the labels of one window, against the sum over all labels."""
    case = minute(
        family,
        **({"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 6} if family == "gpt2" else {}),
    )
    draws = 300
    scoring = case.scoring("int2-g4", tokens=case.tokens[:1].expand(draws, -1))
    units = range(len(case.units))
    found = {unit: value for unit, _, value in fisher_weight(scoring, [(u, 0) for u in units])}
    names = [m.name for unit in case.units for m in unit.matrices]
    fisher = exact_fisher(case, names)
    for unit in units:
        expected = sum(
            float((rows_of(fisher[m.name], m) * scoring.error(m, 0).double().square()).sum())
            for m in case.units[unit].matrices
        ) / (2 * case.tokens.shape[1])
        assert found[unit] == pytest.approx(expected, rel=0.2)


def exact_fisher(case: Any, names: list[str]) -> dict[str, Tensor]:
    """Σ_t Σ_y p_t(y) (∂ log p_t(y) / ∂w)² of the first window: labels are independent."""
    case.model.requires_grad_(True)
    parameters = [case.model.get_parameter(name) for name in names]
    log_p = case.model(input_ids=case.tokens[:1]).logits[0].log_softmax(-1)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for position in log_p:
        for entry in position:
            gradients = torch.autograd.grad(entry, parameters, retain_graph=True)
            for sums, gradient in zip(total, gradients, strict=True):
                sums += entry.detach().exp() * gradient.square()
    case.model.requires_grad_(False)
    return dict(zip(names, total, strict=True))


def test_from_the_widest_candidate(case_of: Any) -> None:
    """½ Σ F (ŵ₃ − ŵ₅)²: as `fisher_weight` of a model that is the widest candidate, with the
    gradients of the model itself.
    """
    case = case_of(num_hidden_layers=2)
    scoring = case.scoring("int3-g16,int5-g16")
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    found = {cell[:2]: cell[2] for cell in fisher_weight_from_widest(scoring, cells)}
    plain = {cell[:2]: cell[2] for cell in fisher_weight(scoring, cells)}
    for unit in range(len(case.units)):
        assert found[unit, 1] == 0
        # |a − b| lies between the difference and the sum of norms in F
        low, high = plain[unit, 0] ** 0.5, plain[unit, 1] ** 0.5
        assert (low - high) ** 2 <= found[unit, 0] * (1 + 1e-5)
        assert found[unit, 0] <= (low + high) ** 2 * (1 + 1e-5)
