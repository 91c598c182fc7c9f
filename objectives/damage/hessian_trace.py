"""Hessian trace by Hutchinson, times the squared error (HAWQ-V2, NeurIPS 2020).

    s = ½ (Tr(H_u) / n_u) ‖Δ_u‖²,   Tr(H) ≈ mean of zᵀ H z,  z of ±1 entries

H is the Hessian of the mean next-token loss. Each product H z is a real
double backward pass; z is drawn for all units at once, and the products across
units average out. The trace ignores that error and curvature are aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitsearch.objectives.damage.gradients import differentiable, next_token_loss
from bitsearch.objectives.damage.scoring import LOWEST, Cell, Scoring, by_unit

DRAWS = 32  # at least; every window takes part equally often


def hessian_trace(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Second-order damage from the mean curvature of the unit; the least where it is negative."""
    windows = len(scoring.tokens)
    traces = hutchinson(scoring, draws=-(-DRAWS // windows) * windows)
    for unit, candidates in by_unit(cells):
        curvature = max(LOWEST, traces[unit]) if traces[unit] else 0.0
        mean_curvature = curvature / scoring.units[unit].parameters
        for candidate in candidates:
            matrices = scoring.units[unit].matrices
            error = sum(float(scoring.error(m, candidate).square_().sum()) for m in matrices)
            yield unit, candidate, 0.5 * mean_curvature * error


def hutchinson(scoring: Scoring, draws: int) -> list[float]:
    """Estimated Tr(H_u) of every unit; draw k takes window k modulo their number."""
    decoder = scoring.decoder
    matrices = [(unit, m) for unit, u in enumerate(scoring.units) for m in u.matrices]
    totals = [0.0] * len(scoring.units)
    # Fused attention kernels have no second derivative; the plain one does.
    with differentiable(decoder, [m for _, m in matrices]) as parameters:
        for draw in range(draws):
            generator = scoring.generator(draw)
            window = scoring.tokens[draw % len(scoring.tokens)].to(decoder.device)
            with sdpa_kernel(SDPBackend.MATH):
                loss = next_token_loss(decoder, window)
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
                signs = [_signs(parameter, generator) for parameter in parameters]
                along = torch.stack(
                    [(g * z).sum() for g, z in zip(gradients, signs, strict=True)]
                ).sum()
                products = torch.autograd.grad(along, parameters)
            for (unit, _), z, product in zip(matrices, signs, products, strict=True):
                totals[unit] += float((z * product).sum(dtype=torch.float64)) / draws
    return totals


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 with equal probability, in the shape of a parameter."""
    bits = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)
