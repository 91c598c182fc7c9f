"""Integer programming with HiGHS: any number of budgets, ties, extra rules.

    minimise    Σ_u Σ_c damage[u, c] z[u, c]
    subject to  Σ_u Σ_c costs[r, u, c] z[u, c] ≤ budgets[r],  Σ_c z[u, c] = 1,  z binary

as in HAWQ-V3 (Yao et al., ICML 2021, section 3.4). HiGHS computes in floating
point with tolerances, so that every answer is checked here in exact arithmetic.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult
from scipy.optimize import milp as highs
from scipy.sparse import coo_array, csr_array, hstack, vstack

from bitsearch.errors import InfeasibleBudget, OutOfResources
from bitsearch.solvers.budget import cost_range, plain, refuse, require_feasible
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.stdout import stdout_to_stderr
from bitsearch.solvers.ties import merge_ties

# HiGHS' tolerances of about 1e-6 are absolute: small beside coefficients like these
_LARGEST_COST = 1e6  # of a resource that is not counted in integers
_TYPICAL_DAMAGE = 1e6
_INFEASIBLE = 2


def solve(
    problem: Problem,
    *,
    seed: int = 0,
    relative_gap: float = 1e-9,
    time_limit: float = 60.0,
) -> Solution:
    """Solve to the asked gap, with the bound that HiGHS proved.

    Args:
        problem: what to solve; a rule such as "at least 4 bits here" is damage
            +inf outside, "equal within a block" is a tie, "at most three formats"
            is `distinct`.
        seed: unused, HiGHS is deterministic (unless the time limit ends it).
        relative_gap: stop once (damage − bound) / (damage − Σ least damage) is below.
        time_limit: seconds, after which the best choice found is returned; what
            that is then depends on the machine.

    Raises:
        InfeasibleBudget: no choice keeps all budgets and rules.
        UsageError: the problem has pair terms.
        OutOfResources: nothing feasible was found within the time limit.
    """
    refuse(problem, "milp", "pairs")
    merged, member = merge_ties(problem)
    require_feasible(merged)
    choice, bound = optimum(formulate(merged), merged, relative_gap, time_limit)
    total = problem.total_damage(choice[member])
    return Solution(choice[member], total, min(bound, total))


def optimum(
    program: Program, problem: Problem, relative_gap: float, time_limit: float
) -> tuple[Choice, float]:
    """The best choice that keeps the problem's budgets exactly, and the bound proved.

    Raises:
        InfeasibleBudget: no choice keeps all budgets and rules.
        OutOfResources: nothing feasible was found within the time limit.
    """
    deadline = time.monotonic() + time_limit
    while True:
        result = program.run(relative_gap, max(0.0, deadline - time.monotonic()))
        if result.x is None:
            _explain(result, problem, time_limit)
        choice = program.choice_of(result.x)
        if problem.feasible(choice):
            return choice, program.damage_of(result.mip_dual_bound)
        program.forbid(choice)  # over a budget by less than HiGHS' tolerance


@dataclass(slots=True)
class Program:
    """The arrays given to HiGHS, in its own scale, and the way back.

    Its columns are the z of allowed candidates, unit by unit, then others:
    indicators of used candidates, or products of z.
    """

    units: NDArray[np.int64]  # (variables,) unit of each z
    candidates: NDArray[np.int64]  # (variables,) candidate of each z
    objective: NDArray[np.float64]  # (columns,)
    integrality: NDArray[np.int64]  # (columns,) 1 where integer
    damage_scale: float
    least_damage: float
    costs: csr_array  # (resources, columns), scaled
    limits: NDArray[np.float64]  # (resources,), scaled
    rules: list[LinearConstraint]

    def run(self, relative_gap: float, time_limit: float) -> OptimizeResult:
        budgets = [LinearConstraint(self.costs, ub=self.limits)] if len(self.limits) else []
        with stdout_to_stderr():
            return highs(
                self.objective,
                integrality=self.integrality,
                bounds=Bounds(0, 1),
                constraints=[*budgets, *self.rules],
                options={"mip_rel_gap": relative_gap, "time_limit": time_limit},
            )

    def damage_of(self, objective: float) -> float:
        return objective * self.damage_scale + self.least_damage

    def choice_of(self, z: NDArray[np.float64]) -> Choice:
        matrix = np.zeros((self.units[-1] + 1, self.candidates.max() + 1))
        matrix[self.units, self.candidates] = z[: len(self.units)]
        choice: Choice = matrix.argmax(axis=1)
        return choice

    def forbid(self, choice: Choice) -> None:
        """Exclude one choice."""
        taken = choice[self.units] == self.candidates
        row = np.zeros(len(self.objective))
        row[: len(taken)] = taken
        self.rules.append(LinearConstraint(csr_array(row[None]), ub=len(choice) - 1))


def formulate(problem: Problem) -> Program:
    """The program of the additive part of a problem without ties."""
    units, candidates = np.nonzero(problem.damage < np.inf)
    variables = len(units)
    # only differences within a unit matter: small numbers, no cancellation
    least = problem.damage.min(axis=1).astype(np.float64)
    damage = problem.damage[units, candidates] - least[units]
    cheapest, dearest = cost_range(problem)
    costs = problem.costs[:, units, candidates] - cheapest[:, units]
    slack = np.minimum(problem.budgets, dearest.sum(axis=1)) - cheapest.sum(axis=1)
    cost_scale = np.array([_cost_scale(row) for row in costs])
    limits = slack / cost_scale

    damage_scale = float(damage.sum()) / variables * len(problem.damage) / _TYPICAL_DAMAGE or 1.0
    rows = csr_array(costs / cost_scale[:, None]) if len(costs) else csr_array((0, variables))
    one_each = coo_array((np.ones(variables), (units, np.arange(variables)))).tocsr()
    rules = [LinearConstraint(one_each, 1, 1)]
    if problem.distinct is not None:
        kinds = problem.damage.shape[1]
        damage = np.concatenate([damage, np.zeros(kinds)])
        rows = hstack([rows, csr_array((rows.shape[0], kinds))]).tocsr()
        rules = _at_most(problem.distinct, kinds, units, candidates)
    return Program(
        units,
        candidates,
        damage / damage_scale,
        np.ones(len(damage), np.int64),
        damage_scale,
        float(least.sum()),
        rows,
        np.floor(limits) if np.issubdtype(costs.dtype, np.integer) else limits,
        rules,
    )


def _cost_scale(row: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """What one unit of the scaled row stands for: of integers, their common divisor."""
    if np.issubdtype(row.dtype, np.integer):
        return float(np.gcd.reduce(row)) or 1.0
    return float(row.max()) / _LARGEST_COST or 1.0


def _at_most(
    distinct: int, kinds: int, units: NDArray[np.int64], candidates: NDArray[np.int64]
) -> list[LinearConstraint]:
    """Indicators y[c] after the z: z[u, c] ≤ y[c] and Σ y ≤ distinct."""
    variables = len(units)
    columns = np.arange(variables)
    ones = np.ones(variables)
    one_each = coo_array((ones, (units, columns)), (units[-1] + 1, variables + kinds))
    used = coo_array((ones, (columns, columns)), (variables, variables + kinds))
    used = used - coo_array((ones, (columns, variables + candidates)), used.shape)
    count = coo_array((np.ones(kinds), (np.zeros(kinds, int), variables + np.arange(kinds))))
    return [
        LinearConstraint(one_each.tocsr(), 1, 1),
        LinearConstraint(vstack([used, count]).tocsr(), ub=[*np.zeros(variables), distinct]),
    ]


def _explain(result: OptimizeResult, problem: Problem, time_limit: float) -> NoReturn:
    """Raise the error that a run without a choice means."""
    if result.status != _INFEASIBLE:
        raise OutOfResources(
            f"HiGHS found no feasible choice within {time_limit:g} s ({result.message}); "
            "raise the time limit or a budget"
        )
    few = problem.distinct
    rule = f" with at most {few} distinct candidates" if few is not None else ""
    ranges = "; ".join(
        f"budget {plain(budget)}, achievable alone {plain(low.sum())} to {plain(high.sum())}"
        for budget, low, high in zip(problem.budgets, *cost_range(problem), strict=True)
    )
    raise InfeasibleBudget(f"no choice keeps all budgets{rule} ({ranges}); raise one of them")
