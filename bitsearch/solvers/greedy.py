"""Greedy: from the cheapest choice, always the best damage saved per byte.

Every step moves one unit to the candidate that saves the most damage per
added byte among those that still fit. Certifies nothing; ends within one
unit's step of the optimum when damages are convex in bytes.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers.budget import byte_budget, require_feasible
from bitsearch.solvers.hull import lower_hulls
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.ties import merge_ties


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """Upgrade from the cheapest choice until nothing that helps fits.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, "greedy")
    require_feasible(merged)
    cheapest = lower_hulls(np.asarray(merged.damage, np.float64), costs).cheapest
    choice = upgrade(np.asarray(merged.damage, np.float64), costs, budget, cheapest)[member]
    return Solution(choice, problem.total_damage(choice), None)


def upgrade(
    damage: NDArray[np.float64], costs: NDArray[np.int64], budget: int, start: Choice
) -> Choice:
    """Improve a feasible choice by steps of the highest gain per byte.

    Args:
        damage: (units, candidates), +inf where a candidate is not allowed.
        costs: (units, candidates).
        budget: limit on the total cost, which `start` keeps.
        start: (units,) the choice to improve; left unchanged.
    """
    choice = start.copy()
    rows = np.arange(len(choice))
    slack = budget - int(costs[rows, choice].sum())

    def best_step(unit: int) -> tuple[float, int, int] | None:
        gain = damage[unit, choice[unit]] - damage[unit]
        step = costs[unit] - costs[unit, choice[unit]]
        useful = (gain > 0) & (step <= slack)
        if not useful.any():
            return None
        # a step that costs nothing or even frees bytes comes before all others
        rate = np.where(useful, np.where(step > 0, gain / np.maximum(step, 1), np.inf), -1.0)
        best = int(np.lexsort((-gain, -rate))[0])
        return -float(rate[best]), unit, best

    steps = [first for unit in rows if (first := best_step(int(unit))) is not None]
    heapq.heapify(steps)
    while steps:
        _, unit, candidate = heapq.heappop(steps)
        step = int(costs[unit, candidate] - costs[unit, choice[unit]])
        if step <= slack:
            choice[unit] = candidate
            slack -= step
        if (following := best_step(unit)) is not None:
            heapq.heappush(steps, following)
    return choice
