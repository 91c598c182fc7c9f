"""Solvers: from tables and budgets to one candidate per unit.

Every solver sees only arrays (`problem.py`). Other packages add theirs under
the entry-point group `bitsearch.solvers`; `bitsearch.testing.SolverContract`
is the suite that each of them must pass.
"""

from __future__ import annotations

from typing import Any

from bitsearch.registry import load
from bitsearch.solvers.problem import Problem, Solution, Solver

GROUP = "bitsearch.solvers"

# They call the real loss: see measured.py, and `MeasuredSolverContract`.
MEASURED: dict[str, str] = {
    "evolution": "bitsearch.solvers.evolution:solve",
    "nsga2": "bitsearch.solvers.nsga2:solve",
    "amq": "bitsearch.solvers.amq:solve",
    "gp": "bitsearch.solvers.bayesian:gp",
    "tpe": "bitsearch.solvers.bayesian:tpe",
    "multipliers": "bitsearch.solvers.multipliers:gp",
    "multipliers_tpe": "bitsearch.solvers.multipliers:tpe",
    "surrogate": "bitsearch.solvers.surrogate:solve",
    "random": "bitsearch.solvers.random_search:solve",
}

SOLVERS: dict[str, str] = {
    "pareto_dp": "bitsearch.solvers.pareto_dp:solve",
    "milp": "bitsearch.solvers.milp:solve",
    "lagrangian": "bitsearch.solvers.lagrangian:solve",
    "greedy": "bitsearch.solvers.greedy:solve",
    "large": "bitsearch.solvers.large:solve",
    "min_max": "bitsearch.solvers.min_max:solve",
    "quadratic": "bitsearch.solvers.quadratic:solve",
    "ranked": "bitsearch.solvers.ranked:solve",
    "cvxpy": "bitsearch.solvers.cvxpy_milp:solve",
    **MEASURED,
}


def load_solver(name: str) -> Any:
    """The `Solver` or `MeasuredSolver` registered under `name`.

    Raises:
        UsageError: nobody registered that name; the message lists those known.
    """
    return load(GROUP, SOLVERS, name)


__all__ = ["GROUP", "MEASURED", "SOLVERS", "Problem", "Solution", "Solver", "load_solver"]
