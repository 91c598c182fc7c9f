"""Make the worst unit as good as possible, then the sum.

    minimise max_u damage[u, choice[u]], and among such choices Σ_u damage[u, choice[u]]

For a threshold, each unit's cheapest candidate with damage below it tells
whether the budget suffices; a binary search over the measured damages finds
the least threshold exactly. NVIDIA ModelOpt's AutoQuantize allocates this way
for its KL score. For scores that do not add up over units.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitsearch.solvers import pareto_dp
from bitsearch.solvers.budget import byte_budget, require_feasible
from bitsearch.solvers.problem import Problem, Solution
from bitsearch.solvers.ties import merge_ties


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """The choice whose worst unit is best, of these the one of least total damage.

    `damage` of the solution is the total; it has no bound, because another
    choice may have less in total and a worse worst unit.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, "min_max")
    require_feasible(merged)
    worst = np.full(merged.damage.shape, -np.inf)
    np.maximum.at(worst, member, problem.damage)  # of each tie, its worst member
    unaffordable = budget + 1

    def enough(threshold: float) -> bool:
        cheapest = np.where(worst <= threshold, costs, unaffordable).min(axis=1)
        return int(cheapest.sum()) <= budget

    thresholds = np.unique(worst[worst < np.inf])
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(thresholds[middle]) else (middle + 1, high)
    within = np.where(problem.damage <= thresholds[high], problem.damage, np.inf)
    best = pareto_dp.solve(replace(problem, damage=within), seed=seed)
    return Solution(best.choice, problem.total_damage(best.choice), None)
