"""Lagrangian relaxation: put a price on cost, then fill the slack.

    L(price) = Σ_u min_c (damage[u, c] + Σ_r price_r costs[r, u, c]) − Σ_r price_r budgets_r

is a lower bound for every price ≥ 0 (Everett, Operations Research 11, 1963;
Shoham and Gersho, IEEE Trans. ASSP 36, 1988, for bit allocation). With one
byte budget the best price is the slope of the hull edge at which the budget
ends; with several it is the dual of the linear relaxation.
"""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from bitsearch.solvers import milp
from bitsearch.solvers.budget import byte_budget, cost_range, refuse, require_feasible
from bitsearch.solvers.greedy import upgrade
from bitsearch.solvers.hull import dual_bound, lower_hulls
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.stdout import stdout_to_stderr
from bitsearch.solvers.ties import merge_ties


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """A feasible choice near the convex front, and the Lagrangian bound.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: there is one resource and its costs are not integers, or the
            problem has pair terms or a limit on distinct candidates.
    """
    refuse(problem, "lagrangian", "distinct", "pairs")
    merged, member = merge_ties(problem)
    if len(merged.budgets) == 1:
        costs, budget = byte_budget(merged, "lagrangian")
        require_feasible(merged)
        damage = np.asarray(merged.damage, np.float64)
        choice, price = relax(damage, costs, budget)
        choice = upgrade(damage, costs, budget, choice)[member]
        bound = dual_bound(damage, costs, budget, price)
    else:
        require_feasible(merged)
        choice, bound = _several(merged)
        choice = choice[member]
    total = problem.total_damage(choice)
    return Solution(choice, total, min(bound, total))


def relax(
    damage: NDArray[np.float64], costs: NDArray[np.int64], budget: int
) -> tuple[Choice, float]:
    """The last choice on the convex front within the budget, and the best price."""
    hulls = lower_hulls(damage, costs)
    slack = budget - int(costs[np.arange(len(costs)), hulls.cheapest].sum())
    within = int(np.searchsorted(np.cumsum(hulls.cost), slack, side="right"))
    price = float(hulls.slope[within]) if within < len(hulls.slope) else 0.0
    return hulls.upgraded(within), price


def _several(problem: Problem) -> tuple[Choice, float]:
    """Round the linear relaxation: all but a few units are whole in it."""
    units, candidates = np.nonzero(problem.damage < np.inf)
    damage = problem.damage[units, candidates].astype(np.float64)
    most = cost_range(problem)[1].sum(axis=1).astype(np.float64)
    budgets = np.minimum(problem.budgets, most)
    # relative costs keep the solver's absolute tolerances meaningful
    cost_scale = np.where(most > 0, most / len(problem.damage), 1.0)
    costs = problem.costs[:, units, candidates]
    scale = float(np.ptp(damage)) or 1.0
    one_each = coo_array((np.ones(len(units)), (units, np.arange(len(units)))))
    with stdout_to_stderr():
        relaxed = linprog(
            damage / scale,
            A_ub=costs / cost_scale[:, None],
            b_ub=budgets / cost_scale,
            A_eq=cast(Any, one_each),  # the stubs do not know that sparse arrays are taken
            b_eq=np.ones(len(problem.damage)),
            method="highs",
        )
    if relaxed.x is None:
        # one of the budgets is out of reach; the integer solver says which
        solution = milp.solve(problem)
        return solution.choice, solution.bound if solution.bound is not None else -np.inf
    prices = np.maximum(0.0, -relaxed.ineqlin.marginals) * scale / cost_scale
    priced = damage + prices @ costs
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    bound = float(np.minimum.reduceat(priced, starts).sum() - prices @ budgets)
    choice = _rounded(problem, units, candidates, relaxed.x)
    if choice is None:
        choice = milp.solve(problem).choice
    return _fill(problem, choice), bound


def _rounded(
    problem: Problem,
    units: NDArray[np.int64],
    candidates: NDArray[np.int64],
    shares: NDArray[np.float64],
) -> Choice | None:
    """The least damaging feasible rounding of the fractional units, if there is one."""
    matrix = np.zeros(problem.damage.shape)
    matrix[units, candidates] = shares
    choice = matrix.argmax(axis=1)
    fractional = np.flatnonzero(matrix.max(axis=1) < 1 - 1e-6)[: len(problem.budgets)]
    options = [np.flatnonzero(problem.damage[unit] < np.inf) for unit in fractional]
    best: tuple[float, Choice] | None = None
    for combination in product(*options):
        trial = choice.copy()
        trial[fractional] = combination
        damage = problem.total_damage(trial)
        if (best is None or damage < best[0]) and problem.feasible(trial):
            best = damage, trial
    return best[1] if best else None


def _fill(problem: Problem, choice: Choice) -> Choice:
    """Take the single change that saves the most damage until none fits."""
    rows = np.arange(len(choice))
    choice = choice.copy()
    while True:
        added = problem.costs - problem.costs[:, rows, choice][:, :, None]
        slack = problem.budgets - problem.total_costs(choice)
        fits = (added <= slack[:, None, None]).all(axis=0)
        gain = np.where(fits, problem.damage[rows, choice][:, None] - problem.damage, 0.0)
        unit, candidate = np.unravel_index(int(gain.argmax()), gain.shape)
        trial = choice.copy()
        trial[unit] = candidate
        if gain[unit, candidate] <= 0 or not problem.feasible(trial):
            return choice
        choice = trial
