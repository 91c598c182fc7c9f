"""Three-objective fronts against every policy."""

from itertools import product

import numpy as np
import pytest

from bitsearch.solvers.front import hypervolume, non_dominated
from bitsearch.solvers.three import front_of_three


def every(damage, first, second):
    """Objectives of all policies, and which no other beats."""
    units, candidates = damage.shape
    choices = np.array(list(product(range(candidates), repeat=units)))
    rows = np.arange(units)
    points = np.array([[t[rows, c].sum() for t in (first, second, damage)] for c in choices])
    return points, non_dominated(points)


@pytest.mark.parametrize("seed", range(8))
def test_every_point_is_optimal_and_little_is_missed(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(1, 100, (4, 3))
    second = rng.exponential(size=(4, 3))
    damage = rng.exponential(size=(4, 3))
    points, best = every(damage, first, second)
    choices, objectives = front_of_three(damage, first, second)
    optimal = {tuple(np.round(point, 9)) for point in points[best]}
    assert {tuple(np.round(point, 9)) for point in objectives} <= optimal
    rows = np.arange(4)
    for choice, (a, b, c) in zip(choices, objectives, strict=True):
        assert a == first[rows, choice].sum() and b == pytest.approx(second[rows, choice].sum())
        assert c == pytest.approx(damage[rows, choice].sum())
    corner = points.max(axis=0) * 1.01
    assert hypervolume(objectives, corner) >= 0.98 * hypervolume(points[best], corner)
    # the best of each objective alone is among them
    assert objectives.min(axis=0) == pytest.approx(points.min(axis=0))


def test_equal_second_cost_leaves_the_front_of_two():
    """Two units of 1 or 2 bytes and damages 4 → 0, 1 → 0: (2, 5), (3, 1), (4, 0)."""
    damage = np.array([[4.0, 0.0], [1.0, 0.0]])
    _, objectives = front_of_three(damage, np.array([[1, 2]] * 2), np.ones((2, 2)))
    assert objectives.tolist() == [[2.0, 2.0, 5.0], [3.0, 2.0, 1.0], [4.0, 2.0, 0.0]]


def test_opposed_costs_keep_slow_small_and_fast_large():
    """One unit: small and slow, large and fast, and one worse in all than the second."""
    damage = np.array([[1.0, 1.0, 2.0]])
    choices, objectives = front_of_three(damage, np.array([[1, 5, 6]]), np.array([[9.0, 2.0, 3.0]]))
    assert choices.tolist() == [[0], [1]]
    assert objectives.tolist() == [[1.0, 9.0, 1.0], [5.0, 2.0, 1.0]]


def test_ties_and_forbidden_candidates_hold():
    damage = np.array([[3.0, 1.0, np.inf], [2.0, 1.0, 0.0]])
    costs = np.array([[1, 2, 3]] * 2)
    choices, _ = front_of_three(damage, costs, costs[:, ::-1].astype(float), ties=[(0, 1)])
    assert sorted(map(tuple, choices.tolist())) == [(0, 0), (1, 1)]
