"""First-order damages equal finite differences and explicit gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitsearch.objectives.damage.first_order import first_order, first_order_signed

FAMILIES = ["llama", "gpt2", "gemma2", "mixtral"]


def mean_loss(case: Any) -> Tensor:
    """Mean next-token loss over all windows, by the model's own forward pass."""
    logits = case.model(input_ids=case.tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).double(), case.tokens[:, 1:].flatten())


def stored(matrix: Any, rows: Tensor, like: Tensor) -> Tensor:
    """(count·out, in) rows in the shape of the parameter."""
    return rows.reshape(like.mT.shape).mT if matrix.transposed else rows.reshape(like.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_signed_equals_the_slope_of_the_loss(family: str, case_of: Any) -> None:
    """|Σ g Δ| is the derivative of the loss along Δ; central differences of it."""
    case = case_of(family, dtype=torch.float64, num_hidden_layers=2)
    scoring = case.scoring()
    step = 0.01  # norms work in float32: less would drown in rounding
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    for unit, candidate, value in first_order_signed(scoring, cells):
        changes = []
        for matrix in case.units[unit].matrices:
            parameter = case.model.get_parameter(matrix.name)
            change = scoring.error(matrix, candidate).double()
            changes.append((parameter, stored(matrix, change, parameter)))
        losses = []
        with scoring.weights.preserved(case.units[unit]):
            for side in (step, -2 * step):
                for parameter, change in changes:
                    parameter.add_(side * change)
                losses.append(float(mean_loss(case)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert value == pytest.approx(abs(slope), rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_unsigned_equals_explicit_gradients(family: str, case_of: Any) -> None:
    case = case_of(family, dtype=torch.float64, num_hidden_layers=2)
    scoring = case.scoring()
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    found = {(unit, c): value for unit, c, value in first_order(scoring, cells)}
    signed = {(unit, c): value for unit, c, value in first_order_signed(scoring, cells)}
    case.model.requires_grad_(True)
    mean_loss(case).backward()
    case.model.requires_grad_(False)
    for (unit, c), value in found.items():
        expected = 0.0
        for matrix in case.units[unit].matrices:
            gradient = case.model.get_parameter(matrix.name).grad
            change = stored(matrix, scoring.error(matrix, c).double(), gradient)
            expected += float((gradient * change).abs().sum())
        assert expected > 0
        assert value == pytest.approx(expected, rel=1e-3)
        assert signed[unit, c] <= value
