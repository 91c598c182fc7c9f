"""The search space: units × candidates, what is allowed, and what it weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import UsageError
from bitsearch.formats import BF16, Format, parse_format
from bitsearch.targets import Target, load_target
from bitsearch.targets.stored import STORED, Stored
from bitsearch.units import ModelLayout, Unit

LINEAR_KINDS = ("linear", "fused", "experts")


@dataclass(frozen=True)
class Space:
    """Every unit with the candidates it may take.

    Attributes:
        layout: the model's structure.
        candidates: formats, in column order.
        allowed: (units, candidates) bool.
        target: which engine it is for, whose files' bytes count.
    """

    layout: ModelLayout
    candidates: tuple[Format, ...]
    allowed: NDArray[np.bool_]
    target: Target = field(default_factory=lambda: load_target("none"))

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in row order."""
        return self.layout.units

    @cached_property
    def bytes(self) -> NDArray[np.int64]:
        """(units, candidates) stored bytes in the layout of the target."""
        stored = self.target.layout
        return np.array(
            [[unit_bytes(unit, f, stored) for f in self.candidates] for unit in self.units],
            dtype=np.int64,
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of everything that is not a unit, in the layout of the target."""
        return self.target.layout.kept * sum(self.layout.kept.values())

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
        kept = self.kept_bytes
        return int(low.sum()) + kept, int(high.sum()) + kept

    def total_bytes(self, choice: NDArray[np.int64]) -> int:
        """Bytes of the whole model under a choice of shape (units,)."""
        return int(self.bytes[np.arange(len(choice)), choice].sum()) + self.kept_bytes

    def assignment(self, choice: NDArray[np.int64]) -> list[tuple[Unit, Format]]:
        """The unit and format pairs of a choice."""
        return [(u, self.candidates[c]) for u, c in zip(self.units, choice, strict=True)]


def unit_bytes(unit: Unit, format: Format, stored: Stored = STORED["packed"]) -> int:
    """Stored bytes of all members of a unit in a format."""
    size = stored.matrix
    return sum(m.count * size(m.out_features, m.in_features, format) for m in unit.matrices)


def make_space(
    layout: ModelLayout,
    candidates: Sequence[Format],
    frozen: Mapping[str, str] | None = None,
    target: Target | None = None,
) -> Space:
    """All units with all candidates that the target runs, but frozen units with one format.

    Where a target runs no candidate, the unit stays at 16 bits.

    Args:
        layout: the model's structure.
        candidates: formats that every unit may take.
        frozen: format name by unit-name pattern (`*` and `?` match); the last
            match counts. The format need not be among the candidates.
        target: the engine that the policy is for; by default none.

    Raises:
        UsageError: a pattern matches no unit, a format is unknown or refused by the target,
            a unit is left without a format that can store its rows, or the target runs no
            candidate at all.
    """
    target = target or load_target("none")
    fixed = [(pattern, parse_format(name)) for pattern, name in (frozen or {}).items()]
    refused = {
        (unit.name, f): target.unit_refusal(unit, layout, f)
        for f in dict.fromkeys([*candidates, *(f for _, f in fixed)])
        for unit in layout.units
    }
    served = [f for f in candidates if not all(refused[u.name, f] for u in layout.units)]
    if all(f.exact for f in served) and not all(f.exact for f in candidates):
        first = layout.units[-1].name, candidates[0]
        raise UsageError(
            f"{first[0]} in {first[1].name}: {refused[first]}; name other --candidates, or none "
            f"for those of {target.name}"
        )
    offered = {unit.name: _offered(unit, served, refused, target) for unit in layout.units}
    columns = list(dict.fromkeys([*served, *(f for _, f in fixed), *_all(offered)]))
    allowed = np.array([[f in offered[unit.name] for f in columns] for unit in layout.units])
    for pattern, format in fixed:
        rows = [i for i, unit in enumerate(layout.units) if fnmatchcase(unit.name, pattern)]
        if not rows:
            raise UsageError(
                f"--freeze pattern '{pattern}' matches no unit; see `bitsearch plan --units`"
            )
        for row in rows:
            if reason := refused[layout.units[row].name, format]:
                raise UsageError(f"--freeze {pattern}={format.name}: {reason}")
        allowed[rows] = False
        allowed[rows, columns.index(format)] = True
    allowed &= np.array([[_fits(unit, f) for f in columns] for unit in layout.units])
    if not allowed.any(axis=1).all():
        unit = layout.units[int(np.flatnonzero(~allowed.any(axis=1))[0])]
        raise UsageError(
            f"{unit.name} has rows of {unit.matrices[0].in_features} weights, which no format "
            "given to it can store in whole blocks; add bf16 or an integer format"
        )
    return Space(layout, tuple(columns), allowed, target)


def _offered(
    unit: Unit, served: Sequence[Format], refused: Mapping[tuple[str, Format], str], target: Target
) -> list[Format]:
    """The candidates of a unit that its target runs; 16 bits where it runs none."""
    found = [f for f in served if not refused[unit.name, f] and _fits(unit, f)]
    if target.groups == "prefer":
        whole = {_width(f) for f in found if _whole(unit, f)}
        found = [f for f in found if _whole(unit, f) or _width(f) not in whole]
    return found or ([BF16] if target.runs else [])


def _fits(unit: Unit, format: Format) -> bool:
    return all(format.fits(matrix.in_features) for matrix in unit.matrices)


def _whole(unit: Unit, format: Format) -> bool:
    """Whether a format's groups divide the rows of a unit."""
    size = format.group_size
    return size is None or all(matrix.in_features % size == 0 for matrix in unit.matrices)


def _width(format: Format) -> tuple[str, int, bool]:
    return format.kind, format.bits, format.symmetric


def _all(offered: Mapping[str, list[Format]]) -> list[Format]:
    return [format for formats in offered.values() for format in formats]
