"""Squared weight error: s = ‖Ŵ − W‖²_F. Data-free; blind to what a weight does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit


def weight_error(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Σ Δ² over all weights of the unit."""
    for unit, candidates in by_unit(cells):
        for candidate in candidates:
            matrices = scoring.units[unit].matrices
            total = sum(float(scoring.error(m, candidate).square_().sum()) for m in matrices)
            yield unit, candidate, total
