"""The integer program as one would write it on paper, through CVXPY.

An independent reference for `milp`, and the place for rules of one's own: any
constraint on the 0-1 matrix z of shape (units, candidates). Needs the extra
`bitsearch[cvxpy]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from bitsearch.errors import InfeasibleBudget, OutOfResources, UsageError
from bitsearch.solvers.budget import refuse, require_feasible
from bitsearch.solvers.problem import Problem, Solution
from bitsearch.solvers.stdout import stdout_to_stderr
from bitsearch.solvers.ties import merge_ties

Rules = Callable[[Any], Sequence[Any]]


def solve(problem: Problem, *, seed: int = 0, rules: Rules | None = None) -> Solution:
    """Solve with whichever integer solver CVXPY finds installed; no bound is kept.

    Args:
        problem: what to solve, with any number of budgets.
        seed: unused, the solvers are deterministic.
        rules: takes the CVXPY variable z of shape (units, candidates) and
            returns more constraints, for example
            `lambda z: [cp.sum(z[:, 0]) <= 10]`, "at most ten units at candidate 0".

    Raises:
        InfeasibleBudget: no choice keeps all budgets and rules.
        UsageError: CVXPY is not installed, or the problem has pair terms.
        OutOfResources: the solver gave up, or its answer is over a budget.
    """
    try:
        cp: Any = import_module("cvxpy")  # typed in part only
    except ImportError:
        raise UsageError(
            "solver 'cvxpy' needs CVXPY: pip install 'bitsearch[cvxpy]', or use solver 'milp'"
        ) from None
    refuse(problem, "cvxpy", "pairs")
    require_feasible(merge_ties(problem)[0])
    allowed = problem.damage < np.inf
    damage = np.where(allowed, problem.damage, 0.0)
    damage_scale = float(np.abs(damage).mean()) or 1.0

    z = cp.Variable(problem.damage.shape, boolean=True)
    constraints = [cp.sum(z, axis=1) == 1, z <= allowed.astype(float)]
    for costs, budget in zip(problem.costs, problem.budgets, strict=True):
        scale = float(costs.mean()) or 1.0
        if budget < costs.max(axis=1).sum():
            constraints.append(cp.sum(cp.multiply(costs / scale, z)) <= budget / scale)
    for first, *others in problem.ties:
        constraints += [z[first] == z[other] for other in others]
    if problem.distinct is not None:
        used = cp.Variable(problem.damage.shape[1], boolean=True)
        constraints += [z[unit] <= used for unit in range(len(problem.damage))]
        constraints.append(cp.sum(used) <= problem.distinct)
    constraints += rules(z) if rules else []
    program = cp.Problem(cp.Minimize(cp.sum(cp.multiply(damage / damage_scale, z))), constraints)
    with stdout_to_stderr():
        try:
            program.solve(solver="HIGHS" if "HIGHS" in cp.installed_solvers() else "SCIPY")
        except cp.SolverError as error:
            raise OutOfResources(f"CVXPY's solver failed ({error}); use solver 'milp'") from None
    if z.value is None:
        raise InfeasibleBudget(
            f"no choice keeps all budgets and rules ({program.status}); raise a budget or drop one"
        )
    choice = z.value.argmax(axis=1)
    if not problem.feasible(choice):
        raise OutOfResources(
            "CVXPY's solver exceeds a budget within its tolerance; use solver 'milp'"
        )
    return Solution(choice, problem.total_damage(choice), None)
