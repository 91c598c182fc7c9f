"""Candidates as rungs: every unit's allowed candidates by rising bytes.

Solvers that propose policies move units up and down their ladders. Units differ
in size, so no exchange of rungs keeps the bytes as they were: `repaired` brings
any policy back to the budget, and spends what is left of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers.budget import byte_budget, require_feasible
from bitsearch.solvers.problem import Choice, Problem
from bitsearch.solvers.ties import merge_ties

Levels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ladders:
    """A problem of one byte budget, ties merged, seen as ladders.

    Attributes:
        problem: the merged problem.
        rungs: by unit: its allowed candidates by rising bytes.
        bytes: by unit: (rungs,) bytes of each.
        budget: most bytes in all.
        member: (units before merging,) merged unit of each.
    """

    problem: Problem
    rungs: tuple[NDArray[np.int64], ...]
    bytes: tuple[NDArray[np.int64], ...]
    budget: int
    member: NDArray[np.int64]

    @property
    def top(self) -> Levels:
        """(units,) highest level of each unit."""
        return np.array([len(rungs) - 1 for rungs in self.rungs], np.int64)

    def total(self, levels: Levels) -> int:
        """Bytes of a policy given as levels."""
        return sum(int(b[level]) for b, level in zip(self.bytes, levels, strict=True))

    def merged_choice(self, levels: Levels) -> Choice:
        """(merged units,) candidates of levels."""
        return np.array([r[level] for r, level in zip(self.rungs, levels, strict=True)], np.int64)

    def choice(self, levels: Levels) -> Choice:
        """(units,) candidates of levels, tied units alike."""
        return self.merged_choice(levels)[self.member]

    def levels(self, choice: Choice) -> Levels:
        """Levels of a (merged units,) choice."""
        pairs = zip(self.rungs, choice, strict=True)
        return np.array([int(np.flatnonzero(r == c)[0]) for r, c in pairs], np.int64)


def make_ladders(problem: Problem, solver: str) -> Ladders:
    """The ladders of a problem.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or other parts that `solver`,
            which the message names, does not take.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, solver)
    require_feasible(merged)
    rungs = []
    for damage, bytes in zip(merged.damage, costs, strict=True):
        allowed = np.flatnonzero(damage < np.inf)
        rungs.append(allowed[np.argsort(bytes[allowed], kind="stable")])
    sizes = tuple(costs[unit][found] for unit, found in enumerate(rungs))
    return Ladders(merged, tuple(rungs), sizes, budget, member)


def repaired(
    ladders: Ladders, levels: Levels, rng: np.random.Generator, kept: Collection[int] = ()
) -> Levels:
    """The nearest policy within the budget that a random walk finds, budget spent.

    Random units step down until the budget holds, then random units step up
    until no step fits. Units in `kept` stay where they are if that is possible.
    """
    levels = levels.copy()
    total, top = ladders.total(levels), ladders.top

    def step(unit: int, by: int) -> int:
        sizes = ladders.bytes[unit]
        return int(sizes[levels[unit] + by] - sizes[levels[unit]])

    free = np.ones(len(levels), np.bool_)
    free[list(kept)] = False
    while total > ladders.budget:
        movable = np.flatnonzero((levels > 0) & free)
        if not len(movable):
            movable = np.flatnonzero(levels > 0)
        unit = int(rng.choice(movable))
        total += step(unit, -1)
        levels[unit] -= 1
    rising = np.flatnonzero((levels < top) & free).tolist()
    while rising:
        unit = rising.pop(int(rng.integers(len(rising))))
        added = step(unit, 1)
        if total + added > ladders.budget:
            continue  # the slack only shrinks: this unit stays where it is
        total += added
        levels[unit] += 1
        if levels[unit] < top[unit]:
            rising.append(unit)
    return levels
