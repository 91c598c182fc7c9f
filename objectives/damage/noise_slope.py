"""Linearity coefficients by noise injection, without data (HIGGS, NAACL 2025).

    E[KL] ≈ Σ_u α_u t_u²,   t² = ‖Ŵ − W‖²_F / ‖W‖²_F

For each unit, Gaussian noise of relative size t_j is added to it alone and the
KL on random tokens is measured; the slope through the origin is
α = Σ_j KL_j t_j² / Σ_j t_j⁴. One α serves every candidate: s = α · t². Holds
where the error looks like small isotropic noise, roughly from 3 bits up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from bitsearch.models.weights import write_weight
from bitsearch.objectives.damage.kl import restart_block
from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit
from bitsearch.objectives.teacher import Teacher

LEVELS = (0.03, 0.06, 0.12)


def noise_slope(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """α · t², with α fitted on tokens drawn uniformly from the vocabulary."""
    vocabulary = scoring.decoder.config.vocab_size
    random = torch.randint(vocabulary, scoring.tokens.shape, generator=scoring.generator())
    teacher = Teacher(scoring.decoder, random, restart=True)
    for unit, candidates in by_unit(cells):
        alpha = _slope(scoring, teacher, unit)
        matrices = scoring.units[unit].matrices
        size = sum(float(scoring.weights.reference(m).square().sum()) for m in matrices)
        for candidate in candidates:
            error = sum(float(scoring.error(m, candidate).square_().sum()) for m in matrices)
            yield unit, candidate, alpha * error / size if error else 0.0


def _slope(scoring: Scoring, teacher: Teacher, index: int) -> float:
    """α of one unit."""
    unit = scoring.units[index]
    originals = [scoring.weights.reference(matrix) for matrix in unit.matrices]
    start = restart_block(unit, len(scoring.decoder.blocks))
    damages = []
    with scoring.weights.preserved(unit):
        for level, size in enumerate(LEVELS):
            generator = scoring.generator(index, level)
            for matrix, weight in zip(unit.matrices, originals, strict=True):
                noise = torch.randn(weight.shape, generator=generator).to(weight.device)
                noisy = noise.mul_(size * weight.square().mean().sqrt()).add_(weight)
                write_weight(scoring.decoder.model, matrix, noisy)
            damages.append(float(teacher.kl(start).double().mean()))
    top = sum(damage * size**2 for damage, size in zip(damages, LEVELS, strict=True))
    slope = top / sum(size**4 for size in LEVELS)
    return math.inf if math.isnan(slope) else max(0.0, slope)
