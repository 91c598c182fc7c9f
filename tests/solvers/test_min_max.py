"""The solver for the worst unit, against brute force."""

from itertools import product

import numpy as np
import pytest

from bitsearch.solvers import min_max, pareto_dp
from bitsearch.solvers.problem import Problem
from bitsearch.testing import model_like_problem, random_problem


@pytest.mark.parametrize("seed", range(40))
def test_worst_unit_then_sum(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 5, 4, forbidden=0.1)
    if seed % 2:
        damage = np.round(problem.damage, 1)
        damage[~np.isfinite(damage)] = 9.0
        most = problem.costs[0].max(axis=1).sum()
        problem = Problem(damage, problem.costs, np.array([most * 2 // 3]), ((0, 2), (1, 4)))
    rows = np.arange(5)
    choices = [np.array(c) for c in product(range(4), repeat=5)]
    scores = [
        (problem.damage[rows, c].max(), problem.total_damage(c))
        for c in choices
        if problem.feasible(c)
    ]
    assert scores
    solution = min_max.solve(problem)
    assert problem.feasible(solution.choice)
    worst, total = min(scores)
    assert problem.damage[rows, solution.choice].max() == worst
    assert solution.damage == pytest.approx(total)
    assert solution.bound is None


def test_trades_the_sum_for_the_worst():
    problem = model_like_problem(np.random.default_rng(0), blocks=8, spread=1.5)
    rows = np.arange(len(problem.damage))
    fair, best = min_max.solve(problem), pareto_dp.solve(problem)
    assert problem.damage[rows, fair.choice].max() < problem.damage[rows, best.choice].max()
    assert fair.damage > best.damage
