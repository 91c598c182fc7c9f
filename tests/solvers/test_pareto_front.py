"""The whole front at once: exact where it fits, certified where it is thinned."""

from itertools import product

import numpy as np
import pytest

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers import pareto_dp
from bitsearch.solvers.pareto_dp import front
from bitsearch.testing import model_like_problem, random_problem


def brute_front(problem):
    """All non-dominated (bytes, damage), by trying every choice."""
    units, candidates = problem.damage.shape
    choices = [np.array(c) for c in product(range(candidates), repeat=units)]
    points = sorted(
        (int(problem.total_costs(c)[0]), problem.total_damage(c))
        for c in choices
        if np.isfinite(problem.total_damage(c))
        and all(len({int(c[u]) for u in tie}) == 1 for tie in problem.ties)
    )
    kept, best = [], np.inf
    for size, damage in points:
        if damage < best - 1e-12:
            kept.append((size, damage))
            best = damage
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_front_is_brute_force(seed):
    problem = random_problem(np.random.default_rng(seed), 5, 3, forbidden=0.1)
    ties = ((1, 3),) if seed % 2 else ()
    problem = type(problem)(problem.damage, problem.costs, problem.budgets, ties)
    expected = brute_front(problem)
    if not expected:
        with pytest.raises(InfeasibleBudget):
            front(problem.damage, problem.costs[0], ties=ties)
        return
    found = front(problem.damage, problem.costs[0], ties=ties)
    assert found.exact and found.resolution == 1
    assert found.bytes.tolist() == [size for size, _ in expected]
    assert found.damage == pytest.approx([damage for _, damage in expected])
    for point in range(len(found)):
        choice = found.choice(point)
        assert problem.total_costs(choice)[0] == found.bytes[point]
        assert problem.total_damage(choice) == pytest.approx(found.damage[point])


def test_every_point_is_the_optimum_of_its_budget():
    problem = model_like_problem(np.random.default_rng(0), blocks=2, formats="int{2,3,4,8}-g64")
    found = front(problem.damage, problem.costs[0], max_points=10**6)
    assert found.exact
    for point in range(0, len(found), len(found) // 25):
        budget = np.array([found.bytes[point]])
        best = pareto_dp.solve(type(problem)(problem.damage, problem.costs, budget))
        assert best.damage == pytest.approx(found.damage[point], rel=1e-12)


def test_thinned_front_is_feasible_and_certified():
    problem = model_like_problem(np.random.default_rng(0), blocks=8)
    found = front(problem.damage, problem.costs[0], max_points=500)
    assert not found.exact and found.resolution > 1 and len(found) <= 501
    assert (np.diff(found.bytes) > 0).all() and (np.diff(found.damage) < 0).all()
    assert found.bytes[0] == problem.costs[0].min(axis=1).sum()
    assert found.damage[-1] == pytest.approx(problem.damage.min(axis=1).sum())
    for point in range(0, len(found), 37):
        choice = found.choice(point)
        assert problem.total_costs(choice)[0] == found.bytes[point]
        assert problem.total_damage(choice) == pytest.approx(found.damage[point])
        budget = np.array([found.bytes[point]])
        best = pareto_dp.solve(type(problem)(problem.damage, problem.costs, budget)).damage
        assert found.bound[point] <= best * (1 + 1e-12)
        assert best <= found.damage[point] * (1 + 1e-12)
    useful = found.damage > 0.05 * found.damage[0]
    gaps = (found.damage - found.bound)[useful] / found.damage[useful]
    assert useful.sum() > 30 and gaps.max() < 0.1 and np.median(gaps) < 0.01


def test_budget_cuts_the_front():
    problem = random_problem(np.random.default_rng(4), 6, 4)
    whole = front(problem.damage, problem.costs[0])
    budget = int(np.median(whole.bytes))
    cut = front(problem.damage, problem.costs[0], budget=budget)
    assert cut.bytes.tolist() == whole.bytes[whole.bytes <= budget].tolist()
    assert whole.within(budget) == len(cut) - 1
    assert whole.within(budget - 0.5) == whole.within(budget - 1)
    for refuse in (
        lambda: whole.within(whole.bytes[0] - 1),
        lambda: front(problem.damage, problem.costs[0], budget=int(whole.bytes[0]) - 1),
    ):
        with pytest.raises(InfeasibleBudget, match=str(whole.bytes[0])):
            refuse()
