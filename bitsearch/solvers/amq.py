"""NSGA-II on the real loss over the units that AMQ does not freeze.

AMQ (Lee et al., EMNLP 2025; arXiv 2509.12019, section 3.2) scores each unit in
its cheapest candidate and freezes those above twice the median score in their
widest one: few, but they would spoil most of the policies that a search draws.
The rest goes to nsga2.py. An outlier that would leave no policy within the
budget is not frozen.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitsearch.solvers import nsga2
from bitsearch.solvers.measured import Loss, StudyPlace, Traits
from bitsearch.solvers.problem import Problem, Solution
from bitsearch.solvers.ties import merge_ties

OUTLIER = 2.0  # times the median


def solve(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """The least measured KL within the budget, outliers frozen in their best candidate.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    found = nsga2.solve(frozen(problem), loss, tokens=tokens, seed=seed, traits=traits, study=study)
    return replace(found, damage=problem.total_damage(found.choice))


def frozen(problem: Problem, factor: float = OUTLIER) -> Problem:
    """The problem without the smaller candidates of outlying units.

    A unit outlies if its damage in its cheapest candidate is above `factor` times
    the median over units; a tie counts as one unit. The largest are frozen first,
    as long as the cheapest of the others fit.
    """
    merged, member = merge_ties(problem)
    damage = np.asarray(merged.damage, np.float64)
    allowed = damage < np.inf
    rows = np.arange(len(damage))
    costs = np.where(allowed, merged.costs[0], np.inf)
    cheapest = costs.argmin(axis=1)
    widest = np.where(allowed, merged.costs[0], -1).argmax(axis=1)
    score = damage[rows, cheapest]
    outliers = np.flatnonzero(score > factor * np.median(score))
    spent = costs[rows, cheapest].sum()
    keep = allowed.copy()
    for unit in outliers[np.argsort(-score[outliers], kind="stable")]:
        added = costs[unit, widest[unit]] - costs[unit, cheapest[unit]]
        if spent + added <= problem.budgets[0]:
            spent += added
            keep[unit] = False
            keep[unit, widest[unit]] = True
    return replace(problem, damage=np.where(keep[member], problem.damage, np.inf))
