"""Every registered solver passes the contract suite that third parties run."""

from importlib.util import find_spec

import numpy as np
import pytest

from bitsearch.errors import UsageError
from bitsearch.solvers import MEASURED, SOLVERS, load_solver
from bitsearch.solvers.problem import Solution
from bitsearch.testing import SolverContract

EXACT = {"pareto_dp", "milp", "large", "quadratic"}

for name in SOLVERS:
    if name in MEASURED or (name == "cvxpy" and find_spec("cvxpy") is None):
        continue
    globals()[f"Test_{name}"] = type(
        f"Test_{name}",
        (SolverContract,),
        {"solver": staticmethod(load_solver(name)), "exact": name in EXACT},
    )


def test_unknown_solver_lists_the_known_ones():
    with pytest.raises(UsageError, match="pareto_dp"):
        load_solver("simplex")


def cheapest(problem, *, seed=0):
    """A solver that ignores ties and gains nothing from its budget."""
    choice = np.where(problem.damage < np.inf, problem.costs[0], 10**12).argmin(axis=1)
    return Solution(choice, problem.total_damage(choice), None)


@pytest.mark.parametrize(
    "broken", ["test_ties_take_one_candidate", "test_infeasible_budget_is_refused", "test_one_unit"]
)
def test_contract_catches_a_bad_solver(broken):
    suite = type("Bad", (SolverContract,), {"solver": staticmethod(cheapest)})()
    with pytest.raises(AssertionError):
        getattr(suite, broken)()
