"""Rules of a user's own: least bits for some units, one format for others, few formats.

They narrow what a solver may choose and leave the tables alone, so that one
run answers searches with different rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from bitsearch.errors import UsageError
from bitsearch.space import Space

BLOCK = "{block}"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a policy must keep beside its budgets.

    Attributes:
        at_least: fewest bits by unit-name pattern; where several match, the most.
        tie: patterns; all units that match one take one format. `{block}` in a
            pattern stands for a block's index and makes one set of each block.
        distinct: most different formats in the policy, frozen units included.
    """

    at_least: Mapping[str, int] = field(default_factory=dict)
    tie: tuple[str, ...] = ()
    distinct: int | None = None

    def narrowed(self, space: Space) -> Space:
        """The space without the candidates that `at_least` rules out.

        Raises:
            UsageError: a pattern matches no unit, or no candidate of one is left.
        """
        bits = np.array([candidate.bits for candidate in space.candidates])
        allowed = space.allowed.copy()
        for pattern, least in self.at_least.items():
            rows = _matching(space, pattern, "--at-least")
            allowed[rows] &= bits >= least
            empty = [row for row in rows if not allowed[row].any()]
            if empty:
                raise UsageError(
                    f"--at-least {pattern}={least} leaves no candidate for "
                    f"{space.units[empty[0]].name}; add one to --candidates, or drop its --freeze"
                )
        return replace(space, allowed=allowed)

    def ties(self, space: Space) -> tuple[tuple[int, ...], ...]:
        """Disjoint sets of unit indices, those of the target among them; sets that share a
        unit become one.

        Raises:
            UsageError: a pattern matches no unit, or tied units allow no format in common.
        """
        sets: list[set[int]] = []
        for joined in [
            *(set(rows) for rows in space.target.ties(space.layout)),
            *(set(rows) for pattern in self.tie for rows in _tied(space, pattern)),
        ]:
            for other in [known for known in sets if known & joined]:
                joined |= other
                sets.remove(other)
            sets.append(joined)
        ties = tuple(tuple(sorted(units)) for units in sets if len(units) > 1)
        for units in ties:
            if not space.allowed[list(units)].all(axis=0).any():
                names = ", ".join(space.units[unit].name for unit in units[:3])
                raise UsageError(
                    f"tied units ({names}{' …' if len(units) > 3 else ''}) allow no format in "
                    "common; drop a --tie, a --freeze or an --at-least"
                )
        return ties

    def describe(self) -> dict[str, object]:
        """The rules that were given, as JSON values."""
        given = {
            "at_least": dict(self.at_least),
            "tie": list(self.tie),
            "distinct": self.distinct,
        }
        return {name: value for name, value in given.items() if value}


NO_RULES = Rules()


def _tied(space: Space, pattern: str) -> list[list[int]]:
    """Rows of the units that a pattern ties, one list for each block if it names `{block}`."""
    if BLOCK not in pattern:
        return [_matching(space, pattern, "--tie")]
    of_block = [pattern.replace(BLOCK, str(block)) for block in range(len(space.layout.blocks))]
    matched = [one for one in of_block if _rows(space, one)]
    return [_rows(space, one) for one in matched] or [_matching(space, pattern, "--tie")]


def _matching(space: Space, pattern: str, option: str) -> list[int]:
    rows = _rows(space, pattern)
    if not rows:
        raise UsageError(
            f"{option} pattern '{pattern}' matches no unit; see `bitsearch plan --units`"
        )
    return rows


def _rows(space: Space, pattern: str) -> list[int]:
    return [row for row, unit in enumerate(space.units) if fnmatchcase(unit.name, pattern)]
