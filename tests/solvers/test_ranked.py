"""Cuts of one ranking, against trying every cut."""

from itertools import product

import numpy as np
import pytest

from bitsearch.errors import UsageError
from bitsearch.solvers import pareto_dp, ranked
from bitsearch.solvers.problem import Problem
from bitsearch.testing import model_like_problem


def test_two_candidates_are_a_threshold():
    """Drops of 5, 1, 4, 3 (units 0 to 3) at 10, 1, 20, 30 bytes: 0, then 2, then 3, then 1.

    31 bytes take units 0 and 2 (30 bytes); unit 3 is next and needs 30, so that unit 1
    stays low though its one byte would fit: it is not its turn.
    """
    damage = np.array([[5.0, 0.0], [1.0, 0.0], [4.0, 0.0], [3.0, 0.0]])
    costs = np.array([[[0, 10], [0, 1], [0, 20], [0, 30]]])
    assert ranked.solve(Problem(damage, costs, np.array([31]))).choice.tolist() == [1, 0, 1, 0]
    assert ranked.solve(Problem(damage, costs, np.array([29]))).choice.tolist() == [1, 0, 0, 0]
    assert ranked.solve(Problem(damage, costs, np.array([61]))).choice.tolist() == [1, 1, 1, 1]


def test_three_candidates_climb_in_turn():
    """Three steps of a byte each: heights 1,1,1 or 2,1,0 in the ranking 0, 1, 2.

    Damages 16 → d → 1, 8 → 2 → 0.5, 4 → 1 → 0.25: heights 1,1,1 leave d + 2 + 1 and
    2,1,0 leave 1 + 2 + 4 = 7. With d = 3.5 the first is 6.5, with d = 4.5 it is 7.5.
    """
    damage = np.array([[16.0, 3.5, 1.0], [8.0, 2.0, 0.5], [4.0, 1.0, 0.25]])
    costs = np.broadcast_to(np.array([0, 1, 2]), (1, 3, 3))
    assert ranked.solve(Problem(damage, costs, np.array([3]))).choice.tolist() == [1, 1, 1]
    damage[0, 1] = 4.5
    assert ranked.solve(Problem(damage, costs, np.array([3]))).choice.tolist() == [2, 1, 0]


@pytest.mark.parametrize("seed", range(25))
def test_best_of_all_cuts(seed):
    rng = np.random.default_rng(seed)
    units, candidates = int(rng.integers(2, 6)), int(rng.integers(2, 5))
    damage = np.sort(rng.exponential(size=(units, candidates)), axis=1)[:, ::-1].copy()
    costs = np.sort(rng.integers(1, 50, (1, units, candidates)), axis=2)
    costs += np.arange(candidates)  # no equal costs: every candidate is a step
    budget = int(costs[0, :, 0].sum() + rng.random() * np.ptp(costs[0], axis=1).sum())
    problem = Problem(damage, costs, np.array([budget]))
    order = np.argsort(-(damage[:, 0] - damage[:, -1]))
    best = min(
        problem.total_damage(choice)
        for choice in map(np.array, product(range(candidates), repeat=units))
        if (np.diff(choice[order]) <= 0).all() and problem.feasible(choice)
    )
    assert ranked.solve(problem).damage == pytest.approx(best)


def test_never_better_than_the_optimum_and_keeps_its_ranking():
    problem = model_like_problem(np.random.default_rng(0), blocks=6)
    found = ranked.solve(problem)
    assert found.damage > pareto_dp.solve(problem).damage
    order = np.argsort(-(problem.damage[:, 0] - problem.damage[:, -1]))
    assert (np.diff(found.choice[order]) <= 0).all()
    assert problem.total_costs(found.choice)[0] > 0.99 * problem.budgets[0]


def test_several_budgets_are_refused():
    with pytest.raises(UsageError, match="one budget"):
        ranked.solve(Problem(np.ones((1, 2)), np.ones((2, 1, 2), int), np.array([5, 5])))
