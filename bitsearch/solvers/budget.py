"""Whether a budget can be met at all, and one byte budget as exact integers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.solvers.problem import Problem


def cost_range(
    problem: Problem,
) -> tuple[NDArray[np.int64] | NDArray[np.float64], NDArray[np.int64] | NDArray[np.float64]]:
    """Least and most that each unit can cost, shapes (resources, units)."""
    allowed = problem.damage < np.inf
    least = np.min(problem.costs, axis=2, where=allowed, initial=problem.costs.max(initial=0))
    return least, np.max(problem.costs, axis=2, where=allowed, initial=0)


def require_feasible(problem: Problem) -> None:
    """Refuse a problem without ties whose budgets are out of reach.

    With several resources each is tried alone: passing is then necessary for
    feasibility, not sufficient.

    Raises:
        InfeasibleBudget: a budget is below the least achievable cost, which the
            message gives.
    """
    dtype = np.float64 if problem.costs.dtype == np.float64 else np.int64
    least, most = (costs.sum(axis=1, dtype=dtype) for costs in cost_range(problem))
    for resource, budget in enumerate(problem.budgets):
        if least[resource] > budget:
            which = f" of resource {resource}" if len(problem.budgets) > 1 else ""
            low, high = plain(least[resource]), plain(most[resource])
            raise InfeasibleBudget(
                f"budget {plain(budget)}{which} is below the least achievable {low}; "
                f"give between {low} and {high}"
            )


_BEYOND = {
    "distinct": "limit the number of distinct candidates; use solver 'milp'",
    "pairs": "take pair terms; use solver 'quadratic'",
}


def refuse(problem: Problem, solver: str, *parts: str) -> None:
    """Refuse parts of a problem (`distinct`, `pairs`) that a solver cannot honour.

    Raises:
        UsageError: the problem has one of them.
    """
    for part in parts:
        if getattr(problem, part) is not None:
            raise UsageError(f"solver '{solver}' cannot {_BEYOND[part]}")


def byte_budget(problem: Problem, solver: str) -> tuple[NDArray[np.int64], int]:
    """Costs (units, candidates) and budget of the only resource, as integers.

    Raises:
        UsageError: there are several resources, costs are not integers, or the
            problem has pair terms or a limit on distinct candidates.
    """
    costs, budget = whole_costs(problem, solver)
    return costs.astype(np.int64, copy=False), budget


def whole_costs(problem: Problem, solver: str) -> tuple[NDArray[np.int64] | NDArray[np.int32], int]:
    """As `byte_budget`, but integers keep their width: no copy of large arrays.

    Raises:
        UsageError: as there.
    """
    refuse(problem, solver, "distinct", "pairs")
    if len(problem.budgets) != 1:
        raise UsageError(
            f"solver '{solver}' takes one budget, not {len(problem.budgets)}; use solver 'milp'"
        )
    costs = problem.costs[0]
    whole: NDArray[np.int64] | NDArray[np.int32]
    if costs.dtype == np.float64:
        whole = costs.astype(np.int64)
        if (whole != costs).any():
            raise UsageError(f"solver '{solver}' takes whole bytes; use solver 'milp'")
    else:
        whole = costs
    most = int(whole.max(axis=1).sum(dtype=np.int64))
    budget = problem.budgets[0]
    return whole, most if budget >= most else int(np.floor(budget))


def plain(number: float) -> str:
    """A cost as a user writes it: bytes in full, no rounding."""
    return (
        f"{int(number)}" if float(number).is_integer() and abs(number) < 1e18 else f"{number:.15g}"
    )
