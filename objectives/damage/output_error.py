"""Output error of a unit from the second moment of its inputs.

    s = Tr(Δ G Δᵀ) = (1/T) Σ_t ‖Δ x_t‖²,   G = (1/T) Σ_t x_t x_tᵀ

and the same over Tr(W G Wᵀ) (normalised error, as in SPDY and EvoPress'
baseline). Without a gradient factor neither is comparable across layer types.
The input of an untied embedding, and of what lies inside fused experts, cannot
be seen from outside; there G is the identity (the weight error).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit
from bitsearch.objectives.memory import available_bytes
from bitsearch.objectives.statistics import input_second_moments


def output_error(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Mean squared norm of the change of the unit's output, per token."""
    for unit, candidate, error, _ in _errors(scoring, cells):
        yield unit, candidate, error


def relative_output_error(
    scoring: Scoring, cells: Sequence[Cell]
) -> Iterator[tuple[int, int, float]]:
    """`output_error` over the mean squared norm of the unit's output."""
    for unit, candidate, error, size in _errors(scoring, cells):
        yield unit, candidate, error / size if size else 0.0


def _errors(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float, float]]:
    """(unit, candidate, Tr ΔGΔᵀ, Tr WGWᵀ), a few units' moments at a time."""
    pending = list(by_unit(cells))
    room = available_bytes(scoring.decoder.device) // 4
    while pending:
        group: list[tuple[int, list[int]]] = []
        used = 0
        while pending and (not group or used + _bytes(scoring, pending[0][0]) < room):
            used += _bytes(scoring, pending[0][0])
            group.append(pending.pop(0))
        moments = second_moments(scoring, [unit for unit, _ in group])
        for unit, candidates in group:
            moment = moments.pop(unit, None)
            matrices = scoring.units[unit].matrices
            size = sum(_trace(scoring.weights.reference(m), moment) for m in matrices)
            for candidate in candidates:
                error = sum(_trace(scoring.error(m, candidate), moment) for m in matrices)
                yield unit, candidate, error, size


def second_moments(scoring: Scoring, units: Sequence[int]) -> dict[int, Tensor]:
    """G of shape (in, in), float32, by unit index, where the input can be seen."""
    chosen = [scoring.units[unit] for unit in units]
    found = input_second_moments(scoring.decoder, chosen, scoring.tokens)
    return {
        index: found[unit.name]
        for index, unit in zip(units, chosen, strict=True)
        if unit.name in found
    }


def _trace(matrix: Tensor, moment: Tensor | None) -> float:
    """Tr(M G Mᵀ) of (rows, in) M; the squared norm without a moment."""
    if moment is None:
        return float(matrix.square().sum())
    return float(((matrix @ moment) * matrix).sum(dtype=torch.float64).clamp(min=0))


def _bytes(scoring: Scoring, unit: int) -> int:
    return 4 * scoring.units[unit].matrices[0].in_features ** 2
