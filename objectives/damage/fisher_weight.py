"""Diagonal Fisher information of the weights times the squared error.

    s = (1/2L) Σ_j F_j Δ_j²,   F_j = mean over windows of g_j²

g is the gradient of one window of L tokens, its labels drawn from the model
(true Fisher: the curvature of KL at the reference), so s predicts KL a token.
One window per gradient: squaring a batch mean is a smaller, different number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bitsearch.objectives.damage.gradients import differentiable, oriented, sampled_token_loss
from bitsearch.objectives.damage.jsd_from_widest import widest_candidate
from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit
from bitsearch.units import Matrix


def fisher_weight(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Predicted KL a token from the weight-side Fisher diagonal."""
    return _scores(scoring, cells, scoring.weights.reference)


def fisher_weight_from_widest(
    scoring: Scoring, cells: Sequence[Cell]
) -> Iterator[tuple[int, int, float]]:
    """`fisher_weight` of the change from the widest candidate's weights, in place of the model's.

    FGMP (Hooper et al., 2025, section 3.1) scores so what is lost between 8 and 4 bits.
    """
    widest = scoring.candidates[widest_candidate(scoring)]
    return _scores(scoring, cells, lambda matrix: scoring.weights.candidate(matrix, widest))


def _scores(
    scoring: Scoring, cells: Sequence[Cell], start: Callable[[Matrix], Tensor]
) -> Iterator[tuple[int, int, float]]:
    """½ Σ F (ŵ − w₀)² a token, w₀ the (rows, in) weights that `start` gives for a matrix."""
    tokens = scoring.tokens.numel()
    diagonal = _diagonal(scoring, sorted({unit for unit, _ in cells}))
    for unit, candidates in by_unit(cells):
        for candidate in candidates:
            total = 0.0
            for m in scoring.units[unit].matrices:
                quantized = scoring.weights.candidate(m, scoring.candidates[candidate])
                squared = quantized.sub_(start(m)).square_()
                total += float(squared.mul_(diagonal[m.name]).sum(dtype=torch.float64))
            yield unit, candidate, total / (2 * tokens)


def _diagonal(scoring: Scoring, units: Sequence[int]) -> dict[str, Tensor]:
    """Σ g² over windows of every weight of some units, (rows, in) by matrix name."""
    decoder = scoring.decoder
    matrices = [matrix for unit in units for matrix in scoring.units[unit].matrices]
    with differentiable(decoder, matrices) as parameters:
        fisher = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for index, window in enumerate(scoring.tokens.to(decoder.device)):
            loss = sampled_token_loss(decoder, window, scoring.generator(index))
            for squares, part in zip(fisher, torch.autograd.grad(loss, parameters), strict=True):
                squares += part.float().square_()
    return {m.name: oriented(m, squares) for m, squares in zip(matrices, fisher, strict=True)}
