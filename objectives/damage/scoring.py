"""What every damage estimator is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from bitsearch.formats import Format
from bitsearch.models.decoder import Decoder
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.units import Matrix, Unit

Cell = tuple[int, int]

# The least damage of a unit that text has reached: a row of zeros says that none has.
LOWEST = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class Scoring:
    """The inputs of an estimator.

    Attributes:
        decoder: the model, holding its reference weights.
        units: what is scored.
        candidates: the formats a unit may take, in column order.
        weights: gives the quantized weights of any unit and candidate.
        tokens: (windows, length) calibration tokens.
        seed: of everything that is drawn at random.
    """

    decoder: Decoder
    units: Sequence[Unit]
    candidates: Sequence[Format]
    weights: CandidateWeights
    tokens: Tensor
    seed: int

    def error(self, matrix: Matrix, candidate: int) -> Tensor:
        """(count·out, in) float32 difference Δ = Ŵ − W of a candidate."""
        quantized = self.weights.candidate(matrix, self.candidates[candidate])
        return quantized.sub_(self.weights.reference(matrix))

    def generator(self, *key: int) -> torch.Generator:
        """A CPU generator for one place in a computation, so that resuming repeats it."""
        seed = self.seed
        for part in key:
            seed = (seed * 1_000_003 + part + 1) % 2**63
        return torch.Generator().manual_seed(seed)


class Estimator(Protocol):
    """Predicts the damage of (unit, candidate) cells.

    Yields each cell asked for, once, as (unit, candidate, damage ≥ 0). A cell's
    value depends on the scoring alone, not on which other cells are asked for.
    """

    def __call__(
        self, scoring: Scoring, cells: Sequence[Cell]
    ) -> Iterator[tuple[int, int, float]]: ...


def by_unit(cells: Iterable[Cell]) -> Iterator[tuple[int, list[int]]]:
    """(unit, candidates) groups of cells, in unit order."""
    for unit, group in groupby(sorted(cells), key=lambda cell: cell[0]):
        yield unit, [candidate for _, candidate in group]
