"""Lower convex hulls of (cost, damage), and the relaxation they solve.

Letting a unit take a mixture of candidates turns the knapsack into a linear
program whose optimum walks along the hull edges of all units, steepest first
(Sinha and Zoltners, "The multiple-choice knapsack problem", Operations
Research 27, 1979). Its value bounds the integer problem from below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers.problem import Choice


@dataclass(frozen=True, slots=True)
class Hulls:
    """Hull edges of all units, by falling slope; a unit's own edges keep their order.

    Attributes:
        cheapest: (units,) first candidate of each hull.
        unit: (edges,) unit of the edge.
        candidate: (edges,) candidate at its far end.
        cost: (edges,) cost it adds.
        gain: (edges,) damage it saves.
        slope: (edges,) gain / cost.
    """

    cheapest: Choice
    unit: NDArray[np.int64]
    candidate: NDArray[np.int64]
    cost: NDArray[np.int64]
    gain: NDArray[np.float64]
    slope: NDArray[np.float64]

    def upgraded(self, edges: int) -> Choice:
        """The choice after walking the first `edges` edges."""
        choice = self.cheapest.copy()
        choice[self.unit[:edges]] = self.candidate[:edges]
        return choice


def lower_hulls(damage: NDArray[np.float64], costs: NDArray[np.int64]) -> Hulls:
    """Walk every unit's hull at once, from its cheapest to its least damaging candidate.

    Args:
        damage: (units, candidates), +inf where not allowed, one finite at least.
        costs: (units, candidates).
    """
    rows = np.arange(len(damage))
    allowed = damage < np.inf
    costliest = costs.max() + 1
    least = np.where(allowed, costs, costliest).min(axis=1, keepdims=True)
    cheapest = np.where(costs == least, damage, np.inf).argmin(axis=1)
    here, ceiling = cheapest, np.full(len(damage), np.inf)
    units, candidates, added, gains, slopes = [], [], [], [], []
    while len(rows):
        step = costs[rows] - costs[rows, here][:, None]
        gain = damage[rows, here][:, None] - damage[rows]
        useful = (step > 0) & (gain > 0)
        slope = np.where(useful, gain / np.where(useful, step, 1), 0.0)
        steepest = slope.max(axis=1, keepdims=True)
        # of collinear points the farthest, so that a hull has no needless vertex
        there = np.where(slope == steepest, step, -1).argmax(axis=1)
        going = steepest[:, 0] > 0
        rows, here, there = rows[going], here[going], there[going]
        # rounding may lift a later slope by an ulp above the one before it
        ceiling = np.minimum(ceiling[going], steepest[going, 0])
        units.append(rows)
        candidates.append(there)
        added.append(step[going, there])
        gains.append(gain[going, there])
        slopes.append(ceiling)
        here = there
    slope = np.concatenate(slopes)
    order = np.argsort(-slope, kind="stable")
    return Hulls(
        cheapest,
        np.concatenate(units)[order],
        np.concatenate(candidates)[order],
        np.concatenate(added)[order],
        np.concatenate(gains)[order],
        slope[order],
    )


def dual_bound(
    damage: NDArray[np.float64], costs: NDArray[np.int64], budget: int, price: float
) -> float:
    """Lagrangian bound Σ_u min_c (damage + price · cost) − price · budget, for price ≥ 0."""
    return float((damage + price * costs).min(axis=1).sum() - price * budget)
