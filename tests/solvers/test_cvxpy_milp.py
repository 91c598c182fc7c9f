"""The CVXPY reference agrees with the SciPy one, and takes rules."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.solvers import cvxpy_milp, milp
from bitsearch.testing import exhaustive, random_problem

cp = pytest.importorskip("cvxpy")


@pytest.mark.slow
def test_agrees_with_milp_on_300_problems():
    for seed in range(300):
        assert_agrees(seed)


def test_agrees_with_milp_on_30_problems():
    for seed in range(300, 330):
        assert_agrees(seed)


def assert_agrees(seed):
    rng = np.random.default_rng(seed)
    units, candidates = int(rng.integers(1, 15)), int(rng.integers(1, 6))
    problem = random_problem(
        rng, units, candidates, resources=int(rng.integers(1, 4)), forbidden=0.1
    )
    if seed % 3 == 0 and units > 3:
        problem = replace(problem, ties=((0, 2), (1, 3)))
    if seed % 4 == 0:
        problem = replace(problem, distinct=int(rng.integers(1, candidates + 1)))
    small = candidates**units <= 5000
    if small:
        best = exhaustive(problem)
    try:
        expected = milp.solve(problem)
    except InfeasibleBudget:
        with pytest.raises(InfeasibleBudget):
            cvxpy_milp.solve(problem)
        assert not small or best is None
        return
    if small:
        assert expected.damage == pytest.approx(best, rel=1e-9)
    solution = cvxpy_milp.solve(problem)
    assert problem.feasible(solution.choice)
    assert solution.damage == pytest.approx(expected.damage, rel=1e-4)
    assert solution.damage >= expected.bound * (1 - 1e-9)


def test_rules_of_ones_own():
    problem = random_problem(np.random.default_rng(0), 12, 3, tightness=0.7)
    free = cvxpy_milp.solve(problem)
    taken = np.bincount(free.choice, minlength=3)
    common = int(taken.argmax())
    limit = int(taken[common]) - 2
    solution = cvxpy_milp.solve(problem, rules=lambda z: [cp.sum(z[:, common]) <= limit])
    assert (solution.choice == common).sum() <= limit
    assert solution.damage > free.damage
    with pytest.raises(InfeasibleBudget, match="rules"):
        cvxpy_milp.solve(problem, rules=lambda z: [cp.sum(z) <= 5])


def test_missing_cvxpy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(UsageError, match=r"bitsearch\[cvxpy\]"):
        cvxpy_milp.solve(random_problem(np.random.default_rng(0), 2, 2))
