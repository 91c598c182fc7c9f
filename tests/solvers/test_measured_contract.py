"""Every measured solver passes the contract suite that third parties run."""

import numpy as np
import pytest

from bitsearch.solvers import MEASURED, SOLVERS, load_solver
from bitsearch.solvers.measured import everywhere, measured_solution, needs_loss
from bitsearch.testing_measured import MeasuredSolverContract

# a Gaussian process costs a second a trial once it has its first ten
GAUSSIAN = ("gp", "multipliers")

for name in MEASURED:
    suite = type(
        f"Test_{name}",
        (MeasuredSolverContract,),
        {"solver": staticmethod(load_solver(name)), "passes": 20 if name == "evolution" else 12},
    )
    globals()[suite.__name__] = pytest.mark.slow(suite) if name in GAUSSIAN else suite
del suite


@pytest.mark.parametrize("name", SOLVERS.keys() - {"cvxpy"})
def test_the_loss_parameter_tells_measured_solvers_apart(name):
    assert needs_loss(load_solver(name)) == (name in MEASURED)


def cheapest(problem, loss, *, tokens, seed=0, traits=None, study=None):
    """Ignores ties, and returns what it measured on one piece alone."""
    choice = np.where(problem.damage < np.inf, problem.costs[0], 10**12).argmin(axis=1)
    loss([choice], [0])
    return measured_solution(problem, choice)


def dearest(problem, loss, *, tokens, seed=0, traits=None, study=None):
    """Ignores the budget."""
    choice = np.where(problem.damage < np.inf, problem.costs[0], -1).argmax(axis=1)
    everywhere(loss, choice)
    return measured_solution(problem, choice)


@pytest.mark.parametrize(
    ("solver", "broken"),
    [
        (cheapest, "test_ties_take_one_candidate"),
        (cheapest, "test_infeasible_budget_is_refused"),
        (cheapest, "test_equal_damages"),
        (dearest, "test_proposals_keep_the_budget"),
    ],
)
def test_contract_catches_a_bad_solver(solver, broken):
    suite = type("Bad", (MeasuredSolverContract,), {"solver": staticmethod(solver)})()
    with pytest.raises(AssertionError):
        getattr(suite, broken)()
