"""Noise of the 8-bit backup as a ranking of units (NNCF's mixed-precision criteria).

    weight_quantization_error:  σ_u = 1 / (max_r mean_j Δ_rj² + ε)
    hessian_input_activation:   σ_u = ‖Δ‖_F · 2 mean_tj x_tj²
    s = σ_u · (b − bits) / (b − b₀)

NNCF 3 (quantization/algorithms/weight_compression/mixed_precision.py) computes Δ
with the precision that it falls back to, never with the 4 bits about to be
chosen; here it is the widest integer candidate, of b bits, b₀ the fewest. The
last factor is 1 for the narrowest and 0 for the widest, so that with these two
NNCF's order remains. A unit whose 8-bit noise is small counts as sensitive to
the first criterion and as insensitive to the second. Embeddings, whose inputs
are no activations, come last, as NNCF has it for the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bitsearch.objectives.damage.scoring import LOWEST, Cell, Scoring, by_unit
from bitsearch.objectives.statistics import input_mean_squares

_EPSILON = float(torch.finfo(torch.float32).eps)


def weight_quantization_error(
    scoring: Scoring, cells: Sequence[Cell]
) -> Iterator[tuple[int, int, float]]:
    """Inverse of the worst row's mean squared noise in the widest candidate; data-free."""
    widest = _widest(scoring)
    for unit, candidates in by_unit(cells):
        errors = (scoring.error(m, widest) for m in scoring.units[unit].matrices)
        worst = max(float(error.square_().mean(dim=1).max()) for error in errors)
        yield from _shares(scoring, unit, candidates, 1.0 / (worst + _EPSILON))


def hessian_input_activation(
    scoring: Scoring, cells: Sequence[Cell]
) -> Iterator[tuple[int, int, float]]:
    """Mean trace of the layer-wise Hessian 2xxᵀ times the noise norm in the widest candidate."""
    widest = _widest(scoring)
    asked = [unit for unit, _ in by_unit(cells)]
    means, _ = input_mean_squares(
        scoring.decoder, [scoring.units[unit] for unit in asked], scoring.tokens
    )
    for unit, candidates in by_unit(cells):
        scored = scoring.units[unit]
        mean = means.get(scored.matrices[0].name)
        score = LOWEST
        if scored.kind != "embedding" and mean is not None:
            errors = (scoring.error(m, widest) for m in scored.matrices)
            norm = sum(float(error.square_().sum()) for error in errors) ** 0.5
            score = norm * 2.0 * float(mean.mean())
        yield from _shares(scoring, unit, candidates, score)


def _widest(scoring: Scoring) -> int:
    """The integer candidate of most bits, the first of several; without integers the widest."""
    formats = scoring.candidates
    return max(range(len(formats)), key=lambda c: (not formats[c].exact, formats[c].bits, -c))


def _shares(
    scoring: Scoring, unit: int, candidates: Sequence[int], score: float
) -> Iterator[tuple[int, int, float]]:
    """The score times the share of the bits that each candidate gives up."""
    most = scoring.candidates[_widest(scoring)].bits
    span = most - min(format.bits for format in scoring.candidates)
    for candidate in candidates:
        given_up = max(0, most - scoring.candidates[candidate].bits)
        yield unit, candidate, score * given_up / span if given_up else 0.0
