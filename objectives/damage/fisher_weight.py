"""Diagonal Fisher information of the weights times the squared error.

    s = (1/2L) Σ_j F_j Δ_j²,   F_j = mean over windows of g_j²

g is the gradient of one window of L tokens, its labels drawn from the model
(true Fisher: the curvature of KL at the reference), so s predicts KL a token.
One window per gradient: squaring a batch mean is a smaller, different number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bitsearch.objectives.damage.gradients import differentiable, oriented, sampled_token_loss
from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit


def fisher_weight(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Predicted KL a token from the weight-side Fisher diagonal."""
    decoder, (windows, length) = scoring.decoder, scoring.tokens.shape
    wanted = sorted({unit for unit, _ in cells})
    matrices = [matrix for unit in wanted for matrix in scoring.units[unit].matrices]
    with differentiable(decoder, matrices) as parameters:
        fisher = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for index, window in enumerate(scoring.tokens.to(decoder.device)):
            loss = sampled_token_loss(decoder, window, scoring.generator(index))
            for squares, part in zip(fisher, torch.autograd.grad(loss, parameters), strict=True):
                squares += part.float().square_()
    diagonal = dict(zip((m.name for m in matrices), fisher, strict=True))
    for unit, candidates in by_unit(cells):
        for candidate in candidates:
            total = 0.0
            for m in scoring.units[unit].matrices:
                squared = scoring.error(m, candidate).square_()
                total += float(squared.mul_(oriented(m, diagonal[m.name])).sum(dtype=torch.float64))
            yield unit, candidate, total / (2 * length * windows)
