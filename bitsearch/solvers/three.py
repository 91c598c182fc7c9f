"""Fronts of three objectives: damage and two costs, such as bytes and milliseconds.

For a price λ of the second cost, the exact two-objective front of

    (Σ first cost, Σ damage + λ · second cost)

consists of policies that no other beats in all three (λ > 0): whatever beat one
would lie below it on that front. A geometric series of prices, from where the
second cost only breaks ties to where it rules, and the dominated ones dropped,
give a front that is complete in the first cost and supported (convex) in the
trade between damage and second cost; points inside a concave part of that
trade are not found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers.front import non_dominated
from bitsearch.solvers.pareto_dp import front
from bitsearch.solvers.problem import Damage

PRICES = 24
POINTS = 256  # of each price's front


def front_of_three(
    damage: Damage,
    first: NDArray[np.int64],
    second: NDArray[np.int64] | NDArray[np.float64],
    *,
    ties: Sequence[tuple[int, ...]] = (),
    prices: int = PRICES,
    max_points: int = POINTS,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Policies that none of the others beats in damage and both costs.

    Args:
        damage: (units, candidates), +inf where a candidate is not allowed.
        first: (units, candidates), integers, such as bytes.
        second: (units, candidates), not negative, such as milliseconds.
        ties: disjoint sets of units that take the same candidate.
        prices: how many prices of the second cost to try.
        max_points: most points of each price's front.

    Returns:
        Choices of shape (points, units), by rising first cost, and objectives of
        shape (points, 3): first cost, second cost, damage.

    Raises:
        InfeasibleBudget: a unit or tie has no allowed candidate.
    """
    harm = np.asarray(damage, np.float64)
    allowed = harm < np.inf
    spans = [
        np.where(allowed, table, -np.inf).max(axis=1) - np.where(allowed, table, np.inf).min(axis=1)
        for table in (harm, second)
    ]
    gain, saving = (float(span[np.isfinite(span)].sum()) for span in spans)
    unit = gain / saving if gain > 0 and saving > 0 else 1.0
    rows = np.arange(len(harm))
    found: dict[bytes, NDArray[np.int64]] = {}
    for price in unit * np.geomspace(1e-6, 1e6, prices):
        curve = front(harm + price * second, first, ties=ties, max_points=max_points)
        for point in range(len(curve)):
            choice = curve.choice(point)
            found.setdefault(choice.tobytes(), choice)
    choices = np.array(list(found.values()))
    objectives = np.array(
        [
            [float(table[rows, choice].sum()) for table in (first, second, harm)]
            for choice in choices
        ]
    )
    kept = np.flatnonzero(non_dominated(objectives))
    kept = kept[np.lexsort(objectives[kept].T[::-1])]
    return choices[kept], objectives[kept]
