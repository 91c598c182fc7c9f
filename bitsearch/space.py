"""The search space: units × candidates, what is allowed, and what it weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import UsageError
from bitsearch.formats import Format, parse_format
from bitsearch.units import ModelLayout, Unit

LINEAR_KINDS = ("linear", "fused", "experts")


@dataclass(frozen=True)
class Space:
    """Every unit with the candidates it may take.

    Attributes:
        layout: the model's structure.
        candidates: formats, in column order.
        allowed: (units, candidates) bool.
    """

    layout: ModelLayout
    candidates: tuple[Format, ...]
    allowed: NDArray[np.bool_]

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in row order."""
        return self.layout.units

    @cached_property
    def bytes(self) -> NDArray[np.int64]:
        """(units, candidates) stored bytes of bitsearch's packed layout."""
        return np.array(
            [[unit_bytes(unit, format) for format in self.candidates] for unit in self.units],
            dtype=np.int64,
        )

    @cached_property
    def linear(self) -> NDArray[np.bool_]:
        """(units,) whether a unit is a linear layer of a block, not embedding or head."""
        return np.array([unit.kind in LINEAR_KINDS for unit in self.units])

    def byte_range(self, scope: NDArray[np.bool_] | None = None) -> tuple[int, int]:
        """Smallest and largest bytes of the model, or of the units in scope alone."""
        low = np.where(self.allowed, self.bytes, np.iinfo(np.int64).max).min(axis=1)
        high = np.where(self.allowed, self.bytes, 0).max(axis=1)
        if scope is not None:
            return int(low[scope].sum()), int(high[scope].sum())
        kept = self.layout.kept_bytes
        return int(low.sum()) + kept, int(high.sum()) + kept

    def total_bytes(self, choice: NDArray[np.int64]) -> int:
        """Bytes of the whole model under a choice of shape (units,)."""
        return int(self.bytes[np.arange(len(choice)), choice].sum()) + self.layout.kept_bytes

    def assignment(self, choice: NDArray[np.int64]) -> list[tuple[Unit, Format]]:
        """The unit and format pairs of a choice."""
        return [(u, self.candidates[c]) for u, c in zip(self.units, choice, strict=True)]


def unit_bytes(unit: Unit, format: Format) -> int:
    """Stored bytes of all members of a unit in a format."""
    return sum(m.count * format.bytes(m.out_features, m.in_features) for m in unit.matrices)


def make_space(
    layout: ModelLayout, candidates: Sequence[Format], frozen: Mapping[str, str] | None = None
) -> Space:
    """All units with all candidates, but frozen units with their one format.

    Args:
        layout: the model's structure.
        candidates: formats that every unit may take.
        frozen: format name by unit-name pattern (`*` and `?` match); the last
            match counts. The format need not be among the candidates.

    Raises:
        UsageError: a pattern matches no unit, a format is unknown, or a unit is left
            without a format that can store its rows.
    """
    fixed = [(pattern, parse_format(name)) for pattern, name in (frozen or {}).items()]
    columns = list(candidates) + [
        f for f in dict.fromkeys(f for _, f in fixed) if f not in candidates
    ]
    allowed = np.zeros((len(layout.units), len(columns)), dtype=bool)
    stored = np.array(
        [[all(f.fits(m.in_features) for m in u.matrices) for f in columns] for u in layout.units]
    )
    allowed[:, : len(candidates)] = stored[:, : len(candidates)]
    for pattern, format in fixed:
        rows = [i for i, unit in enumerate(layout.units) if fnmatchcase(unit.name, pattern)]
        if not rows:
            raise UsageError(
                f"--freeze pattern '{pattern}' matches no unit; see `bitsearch plan --units`"
            )
        allowed[rows] = False
        allowed[rows, columns.index(format)] = True
    allowed &= stored
    if not allowed.any(axis=1).all():
        unit = layout.units[int(np.flatnonzero(~allowed.any(axis=1))[0])]
        raise UsageError(
            f"{unit.name} has rows of {unit.matrices[0].in_features} weights, which no format "
            "given to it can store in whole blocks; add bf16 or an integer format"
        )
    return Space(layout, tuple(columns), allowed)
