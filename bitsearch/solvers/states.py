"""Lists of non-dominated partial policies, grown unit by unit.

The dynamic programme of Nemhauser and Ullmann ("Discrete dynamic programming
and capital allocation", Management Science 15, 1969) for the multiple-choice
knapsack, with numpy sorts in place of merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keep = Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class States:
    """Partial policies of some units, none of which beats another in both sums.

    Attributes:
        costs: (states,) total cost, rising.
        damage: (states,) total damage, falling.
        trail: one entry a unit: (states,) arrays of the state it grew from and
            the candidate taken.
    """

    costs: NDArray[np.int64]
    damage: NDArray[np.float64]
    trail: tuple[tuple[NDArray[np.int32], NDArray[np.uint16]], ...] = ()

    def __len__(self) -> int:
        return len(self.costs)

    def grown(self, costs: NDArray[np.int64], damage: NDArray[np.float64], keep: Keep) -> States:
        """These policies with one more unit, dominated ones dropped.

        Args:
            costs: (candidates,) of the unit.
            damage: (candidates,) of the unit, +inf where not allowed.
            keep: tells from total costs and damages which states can matter.
        """
        parts = []
        allowed = np.flatnonzero(damage < np.inf)
        for candidate in allowed[non_dominated(costs[allowed], damage[allowed])]:
            new_costs = self.costs + costs[candidate]
            new_damage = self.damage + damage[candidate]
            parents = np.flatnonzero(keep(new_costs, new_damage))
            taken = np.full(len(parents), candidate, np.uint16)
            parts.append((new_costs[parents], new_damage[parents], parents, taken))
        all_costs, all_damage, parents, taken = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        kept = non_dominated(all_costs, all_damage)
        step = parents[kept].astype(np.int32), taken[kept]
        return States(all_costs[kept], all_damage[kept], (*self.trail, step))

    def only(self, kept: NDArray[np.int64]) -> States:
        """The states at the given indices, in that order."""
        *past, (parents, taken) = self.trail
        last = parents[kept], taken[kept]
        return States(self.costs[kept], self.damage[kept], (*past, last))

    def candidates(self, state: int) -> list[int]:
        """The candidate of each unit, in the order in which units were added."""
        path = []
        for parents, taken in reversed(self.trail):
            path.append(int(taken[state]))
            state = int(parents[state])
        return path[::-1]


def empty() -> States:
    """The policy of no unit."""
    return States(np.zeros(1, np.int64), np.zeros(1))


def non_dominated(costs: NDArray[np.int64], damage: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points that no other beats, by rising cost.

    Of equal points one is kept.
    """
    # stable: merges the already sorted runs of `grown` in linear time
    order = np.argsort(costs, kind="stable")
    costs, damage = costs[order], damage[order]
    best = np.minimum.accumulate(damage)
    better = np.ones(len(order), np.bool_)
    better[1:] = damage[1:] < best[:-1]
    kept = np.flatnonzero(better)
    # at equal cost the last is the best
    last = np.ones(len(kept), np.bool_)
    last[:-1] = costs[kept[1:]] != costs[kept[:-1]]
    return order[kept[last]]
