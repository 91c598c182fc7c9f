"""First-order damage |g·Δ|, g the gradient of the mean loss on calibration text.

Two published readings: the absolute value inside the sum (AutoRound's
AutoScheme) and outside of it (LLM-MQ, NeurIPS workshop 2023). Both vanish as
the gradient does near an optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitsearch.objectives.damage.gradients import differentiable, next_token_loss, oriented
from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit
from bitsearch.units import Matrix


def first_order(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Σ |g ⊙ Δ| over the weights of the unit."""
    for unit, candidate, product in _products(scoring, cells):
        yield unit, candidate, sum(float(p.abs().sum(dtype=torch.float64)) for p in product)


def first_order_signed(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """|Σ g ⊙ Δ| over the weights of the unit."""
    for unit, candidate, product in _products(scoring, cells):
        yield unit, candidate, abs(sum(float(p.sum(dtype=torch.float64)) for p in product))


def _products(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(unit, candidate, g ⊙ Δ of each matrix)."""
    wanted = sorted({unit for unit, _ in cells})
    matrices = [matrix for unit in wanted for matrix in scoring.units[unit].matrices]
    gradients = dict(zip((m.name for m in matrices), mean_gradient(scoring, matrices), strict=True))
    for unit, candidates in by_unit(cells):
        for candidate in candidates:
            yield (
                unit,
                candidate,
                [
                    scoring.error(m, candidate).mul_(oriented(m, gradients[m.name]))
                    for m in scoring.units[unit].matrices
                ],
            )


def mean_gradient(scoring: Scoring, matrices: Sequence[Matrix]) -> list[Tensor]:
    """Gradient of the mean next-token loss, window by window, as stored."""
    with differentiable(scoring.decoder, matrices) as parameters:
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for window in scoring.tokens.to(scoring.decoder.device):
            loss = next_token_loss(scoring.decoder, window)
            for total, part in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += part
    return [total / len(scoring.tokens) for total in sums]
