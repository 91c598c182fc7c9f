"""HiGHS through SciPy: several budgets, rules, and what goes wrong."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bitsearch.errors import InfeasibleBudget, OutOfResources, UsageError
from bitsearch.solvers import lagrangian, milp
from bitsearch.solvers.problem import Problem
from bitsearch.solvers.stdout import stdout_to_stderr
from bitsearch.testing import exhaustive, model_like_problem, random_problem


def with_latency(problem, rng, slack=1.1):
    """Add milliseconds that do not follow bytes, and a budget near their median."""
    ms = problem.costs * rng.uniform(0.5, 1.5, problem.costs.shape) / 1e9
    budget = slack * np.median(ms, axis=2).sum()
    return Problem(
        problem.damage,
        np.concatenate([problem.costs.astype(float), ms]),
        np.array([problem.budgets[0], budget]),
    )


def test_bytes_and_milliseconds_together():
    rng = np.random.default_rng(0)
    one = model_like_problem(rng, blocks=8, bits=5)
    problem = with_latency(one, rng, slack=0.8)
    solution = milp.solve(problem)
    assert problem.feasible(solution.choice)
    assert solution.gap < 1e-7
    assert solution.damage > milp.solve(one).damage
    relaxed = lagrangian.solve(problem)
    assert problem.feasible(relaxed.choice)
    assert relaxed.bound <= solution.damage <= relaxed.damage < 1.05 * solution.damage


def test_budgets_that_exclude_each_other():
    costs = np.array([[[0, 9]], [[9, 0]]])
    problem = Problem(np.array([[1.0, 2.0]]), costs, np.array([5, 6]))
    for solve in (milp.solve, lagrangian.solve):
        with pytest.raises(InfeasibleBudget, match=r"budget 5, achievable alone 0 to 9"):
            solve(problem)


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_budget_just_below_a_choice_is_not_within_tolerance(dtype):
    # costs of ten digits: a byte too many is far below the tolerances of HiGHS
    for seed in range(4):
        rng = np.random.default_rng(seed)
        costs = rng.integers(0, 10**10, (1, 6, 3)).astype(dtype)
        damage = -costs[0] / 1e10
        half = np.array([costs.mean(axis=2).sum()]).astype(dtype)
        reached = Problem(damage, costs, half).total_costs(
            milp.solve(Problem(damage, costs, half)).choice
        )
        below = Problem(damage, costs, reached - 1)
        solution = milp.solve(below)
        assert below.feasible(solution.choice)
        assert solution.damage == pytest.approx(exhaustive(below), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_any_unit_of_damage(scale):
    problem = random_problem(np.random.default_rng(1), 20, 5)
    scaled = Problem(problem.damage * scale, problem.costs, problem.budgets)
    assert milp.solve(scaled).damage == pytest.approx(milp.solve(problem).damage * scale, rel=1e-9)


def test_at_most_so_many_distinct_candidates():
    problem = model_like_problem(np.random.default_rng(2), blocks=3, bits=4.2)
    damages = []
    for distinct in (1, 2, 3, 8):
        solution = milp.solve(replace(problem, distinct=distinct))
        assert len(set(solution.choice.tolist())) <= distinct
        assert problem.feasible(solution.choice)
        damages.append(solution.damage)
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == pytest.approx(milp.solve(problem).damage)
    uniform = [
        problem.damage[:, c].sum()
        for c in range(problem.damage.shape[1])
        if problem.costs[0, :, c].sum() <= problem.budgets[0]
    ]
    assert damages[0] == pytest.approx(min(uniform))


def test_distinct_may_be_what_makes_it_infeasible():
    damage = np.array([[1.0, np.inf], [np.inf, 1.0]])
    problem = Problem(damage, np.ones((1, 2, 2), int), np.array([2]))
    assert milp.solve(problem).choice.tolist() == [0, 1]
    with pytest.raises(InfeasibleBudget, match="at most 1 distinct"):
        milp.solve(replace(problem, distinct=1))
    with pytest.raises(UsageError, match="distinct"):
        replace(problem, distinct=0)


def test_time_limit_is_told():
    problem = random_problem(np.random.default_rng(0), 200, 10, resources=3, tightness=0.01)
    with pytest.raises(OutOfResources, match="raise the time limit"):
        milp.solve(problem, time_limit=0.0)


def test_native_prints_go_to_stderr(capfd):
    import os

    with stdout_to_stderr():
        os.write(1, b"native\n")
    os.write(1, b"result\n")
    assert capfd.readouterr() == ("result\n", "native\n")


def test_closed_stdout_is_no_error():
    code = (
        "import os; os.close(1)\n"
        "from bitsearch.solvers.stdout import stdout_to_stderr\n"
        "with stdout_to_stderr(): pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
