"""Byte-matched controls: never over budget, and what they are named after."""

import numpy as np
import pytest

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers import pareto_dp
from bitsearch.solvers.controls import first_last, raised, random_feasible, reversed_ranking, spread
from bitsearch.solvers.problem import Problem
from bitsearch.testing import model_like_problem, random_problem


def equal_units(budget, units=100):
    """100 equal units of 10 or 20 bytes."""
    costs = np.tile([10, 20], (units, 1))
    return Problem(np.tile([2.0, 1.0], (units, 1)), costs[None], np.array([budget]))


@pytest.mark.parametrize("seed", range(30))
def test_random_mix_is_feasible_and_full(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 12, 4, forbidden=0.1)
    if seed % 3 == 0:
        problem = Problem(problem.damage, problem.costs, problem.budgets, ((0, 1), (5, 2)))
        problem.damage[~np.isfinite(problem.damage)] = 9.0
        problem.budgets[:] = max(problem.budgets[0], problem.costs[0].mean(axis=1).sum())
    choice = random_feasible(problem, rng)
    assert problem.feasible(choice)
    tied = {u: tie for tie in problem.ties for u in tie}
    for unit in range(12):
        group = list(tied.get(unit, (unit,)))
        here = problem.costs[0, group, choice[group]].sum()
        for candidate in range(4):
            step = choice.copy()
            step[group] = candidate
            allowed = np.isfinite(problem.damage[group, candidate]).all()
            if allowed and problem.costs[0, group, candidate].sum() > here:
                dearer = np.setdiff1d(np.arange(4), choice[unit])
                cheapest_step = min(
                    problem.costs[0, group, c].sum()
                    for c in dearer
                    if problem.costs[0, group, c].sum() > here
                    and np.isfinite(problem.damage[group, c]).all()
                )
                step_up = cheapest_step - here
                assert problem.total_costs(choice)[0] + step_up > problem.budgets[0]


def test_random_mixes_differ_and_reach_every_candidate():
    problem = model_like_problem(np.random.default_rng(0), blocks=4, bits=4.0)
    rng = np.random.default_rng(1)
    mixes = np.array([random_feasible(problem, rng) for _ in range(50)])
    assert len({mix.tobytes() for mix in mixes}) == 50
    assert all((mixes == c).any() for c in range(problem.damage.shape[1]))
    again = random_feasible(problem, np.random.default_rng(1))
    assert again.tolist() == mixes[0].tolist()


@pytest.mark.parametrize("count", [1, 7, 25, 50, 81])
def test_spread_is_even_over_depth(count):
    choice = spread(equal_units(1000 + 10 * count + 5), low=0, high=1)
    at = np.flatnonzero(choice)
    assert len(at) == count
    # in every window the share of raised units is near the share overall
    for window in (20, 50):
        shares = np.convolve(choice, np.ones(window), mode="valid")
        assert abs(shares - window * count / 100).max() <= 2.5


def test_spread_prefers_no_role_in_the_block():
    choice = spread(equal_units(700 * 10 + 100 * 10, units=700), low=0, high=1)
    per_role = choice.reshape(100, 7).sum(axis=0)
    assert per_role.min() >= 12 and per_role.max() <= 17


def test_spread_is_uniform_at_its_ends():
    assert spread(equal_units(1000), 0, 1).tolist() == [0] * 100
    assert spread(equal_units(2000), 0, 1).tolist() == [1] * 100
    assert spread(equal_units(1999), 0, 0).tolist() == [0] * 100
    with pytest.raises(InfeasibleBudget, match="1000"):
        spread(equal_units(999), 0, 1)
    with pytest.raises(InfeasibleBudget, match="2000 bytes of candidate 1"):
        spread(equal_units(1999), 1, 1)


def test_first_and_last_blocks_come_first():
    blocks = np.repeat(np.arange(10), 10)
    choice = first_last(equal_units(1000 + 10 * 40), blocks, low=0, high=1)
    assert np.flatnonzero(choice.reshape(10, 10).all(axis=1)).tolist() == [0, 1, 8, 9]
    assert choice.sum() == 40


def test_smaller_units_use_up_the_slack():
    costs = np.array([[[10, 50], [10, 90], [10, 30]]])
    problem = Problem(np.tile([2.0, 1.0], (3, 1)), costs, np.array([90]))
    assert raised(problem, 0, 1, np.arange(3)).tolist() == [1, 0, 1]


def test_forbidden_low_and_high():
    damage = np.array([[np.inf, 2.0, 1.0], [3.0, 2.0, np.inf], [3.0, 2.0, 1.0]])
    costs = np.tile([10, 20, 30], (3, 1))
    problem = Problem(damage, costs[None], np.array([1000]))
    assert raised(problem, 0, 0, np.arange(3)).tolist() == [1, 0, 0]
    assert raised(problem, 0, 2, np.arange(3)).tolist() == [2, 0, 2]


def test_ties_are_raised_together():
    problem = equal_units(1000 + 10 * 3)
    tied = Problem(problem.damage, problem.costs, problem.budgets, ((3, 50, 99), (7, 8)))
    choice = raised(tied, 0, 1, np.argsort(np.arange(100) != 50, kind="stable"))
    assert np.flatnonzero(choice).tolist() == [3, 50, 99]


def test_reversed_ranking_mirrors_the_widths():
    # equal sizes, sensitivities 1, 4, 16, …: the optimum steps up one candidate per factor 4
    units, widths = 5, np.arange(1, 7)
    damage = 4.0 ** np.arange(units)[:, None] * 4.0**-widths
    costs = np.tile(widths * 100, (units, 1))
    problem = Problem(damage, costs[None], np.array([100 * (1 + 2 + 3 + 4 + 5)]))
    best = pareto_dp.solve(problem).choice
    assert best.tolist() == [0, 1, 2, 3, 4]
    assert reversed_ranking(problem).tolist() == best[::-1].tolist()


def test_reversed_ranking_is_feasible_and_worse():
    problem = model_like_problem(np.random.default_rng(3), blocks=8, spread=1.5)
    problem.damage[5, 3:] = np.inf
    tied = Problem(problem.damage, problem.costs, problem.budgets, ((0, 7),))
    choice = reversed_ranking(tied)
    assert tied.feasible(choice)
    assert tied.total_damage(choice) > 2 * pareto_dp.solve(tied).damage


def test_infeasible_budgets_are_refused():
    problem = equal_units(999)
    for control in (lambda p: random_feasible(p, np.random.default_rng(0)), reversed_ranking):
        with pytest.raises(InfeasibleBudget, match=r"999.*1000"):
            control(problem)
