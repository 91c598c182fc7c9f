"""Top Hessian eigenvalue of each unit by power iteration (HAWQ, ICCV 2019).

    bound:    s = ½ λ_u ‖Δ_u‖²            at least ½ Δᵀ H_u Δ
    ranking:  s = (λ_u / n_u) · 4^(−bits)

H_u is the unit's diagonal block of the Hessian of the mean next-token loss, λ_u
its largest eigenvalue, n_u its number of weights. λ‖Δ‖² is the paper's order of
fine-tuning (section 3.2), λ/n the order in which it hands out widths (section
3.1); the factor 4^(−bits), the same for every unit, keeps that order and makes
more bits do less damage.

v ← Hv / ‖Hv‖ from a random start, until the Rayleigh quotient vᵀHv settles.
Each product is a double backward pass for one unit alone, on the first few
windows together: dearer than the trace, where one pass serves all units. One
eigenvalue says little of a spectrum of millions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitsearch.objectives.damage.gradients import differentiable, next_token_loss
from bitsearch.objectives.damage.scoring import LOWEST, Cell, Scoring, by_unit

WINDOWS = 4  # as many as are differentiated together
ITERATIONS = 50
TOLERANCE = 1e-3  # relative change of the Rayleigh quotient at which to stop

Vectors = list[Tensor]


def hessian_eigenvalue(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Bound on the second-order damage from the top eigenvalue; the least if that is negative."""
    for unit, candidates in by_unit(cells):
        half = 0.5 * _not_negative(top_eigenvalue(scoring, unit))
        for candidate in candidates:
            matrices = scoring.units[unit].matrices
            error = sum(float(scoring.error(m, candidate).square_().sum()) for m in matrices)
            yield unit, candidate, half * error


def hessian_eigenvalue_ranking(
    scoring: Scoring, cells: Sequence[Cell]
) -> Iterator[tuple[int, int, float]]:
    """Top eigenvalue a weight, falling by 4 a bit: ranks units, knows nothing of their errors."""
    for unit, candidates in by_unit(cells):
        sensitivity = _not_negative(top_eigenvalue(scoring, unit))
        sensitivity /= scoring.units[unit].parameters
        for candidate in candidates:
            yield unit, candidate, sensitivity * 4.0 ** -scoring.candidates[candidate].bits


def _not_negative(eigenvalue: float) -> float:
    return max(LOWEST, eigenvalue) if eigenvalue else 0.0


def top_eigenvalue(scoring: Scoring, index: int) -> float:
    """λ_u, the algebraically largest eigenvalue of a unit's block of the Hessian."""
    decoder, unit = scoring.decoder, scoring.units[index]
    windows = scoring.tokens[:WINDOWS].to(decoder.device)
    # Fused attention kernels have no second derivative; the plain one does.
    with differentiable(decoder, unit.matrices) as parameters, sdpa_kernel(SDPBackend.MATH):
        loss = torch.stack([next_token_loss(decoder, window) for window in windows]).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)

        def product(vectors: Vectors) -> Vectors:
            return list(torch.autograd.grad(gradients, parameters, vectors, retain_graph=True))

        generator = scoring.generator(index)
        start = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        largest = _power(product, start)
        if largest >= 0:
            return largest

        # The largest in size is negative: shifted by it, the top one is the largest.
        def shifted(vectors: Vectors) -> Vectors:
            found = product(vectors)
            return [h.sub_(v, alpha=largest) for h, v in zip(found, vectors, strict=True)]

        return _power(shifted, start) + largest


def _power(product: Callable[[Vectors], Vectors], vectors: Vectors) -> float:
    """The eigenvalue of largest size."""
    quotient = 0.0
    for _ in range(ITERATIONS):
        norm = sum(float(v.square().sum(dtype=torch.float64)) for v in vectors) ** 0.5
        if norm == 0.0:  # the loss does not depend on the unit
            return 0.0
        vectors = [v / norm for v in vectors]
        image = product(vectors)
        before, quotient = (
            quotient,
            sum(
                float((v * h).sum(dtype=torch.float64)) for v, h in zip(vectors, image, strict=True)
            ),
        )
        if abs(quotient - before) <= TOLERANCE * abs(quotient):
            break
        vectors = image
    return quotient
