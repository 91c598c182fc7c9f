"""Exact solvers against brute force and against each other."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.solvers import greedy, lagrangian, milp, pareto_dp
from bitsearch.solvers.problem import Problem
from bitsearch.testing import exhaustive, model_like_problem, random_problem

damages = st.one_of(st.integers(-2, 9).map(float), st.floats(-1, 100), st.just(np.inf))


@st.composite
def problems(draw, resources=range(1, 2)):
    """Small and awkward: equal, zero, forbidden, tied, out of reach."""
    units, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cells = units * candidates
    count = draw(st.sampled_from(resources))
    largest = draw(st.sampled_from([1, 5, 10**10]))
    damage = draw(st.lists(damages, min_size=cells, max_size=cells))
    costs = draw(st.lists(st.integers(0, largest), min_size=cells * count, max_size=cells * count))
    budgets = [draw(st.integers(0, units * largest)) for _ in range(count)]
    ties = ((0, units - 1),) if units > 1 and draw(st.booleans()) else ()
    return Problem(
        np.array(damage).reshape(units, candidates),
        np.array(costs).reshape(count, units, candidates),
        np.array(budgets),
        ties,
    )


def assert_optimal(solve, problem):
    best = exhaustive(problem)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            solve(problem)
        return
    solution = solve(problem)
    assert problem.feasible(solution.choice)
    assert solution.damage == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solution.bound == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_pareto_dp_is_brute_force(problem):
    assert_optimal(pareto_dp.solve, problem)


@settings(max_examples=100, deadline=None)
@given(problems(resources=range(4)))
def test_milp_is_brute_force_for_any_number_of_budgets(problem):
    assert_optimal(milp.solve, problem)


@settings(max_examples=100, deadline=None)
@given(problems(resources=range(1, 4)))
def test_lagrangian_is_feasible_and_its_bound_holds(problem):
    best = exhaustive(problem)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            lagrangian.solve(problem)
        return
    solution = lagrangian.solve(problem)
    assert problem.feasible(solution.choice)
    tolerance = 1e-9 * max(1, abs(best))
    assert solution.bound - tolerance <= best <= solution.damage + tolerance


def test_lagrangian_finds_a_choice_where_rounding_its_relaxation_does_not():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        units, resources = int(rng.integers(3, 8)), int(rng.integers(2, 4))
        problem = random_problem(rng, units, 4, resources=resources, tightness=0.1 * rng.random())
        solution = lagrangian.solve(problem)
        assert problem.feasible(solution.choice)
        assert solution.bound <= milp.solve(problem).damage * (1 + 1e-9)


def test_pareto_dp_agrees_with_milp_on_200_problems():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        units, candidates = int(rng.integers(5, 40)), int(rng.integers(2, 8))
        problem = random_problem(rng, units, candidates, forbidden=0.1)
        if seed % 5 == 0:
            problem = replace(problem, ties=((0, 1), (2, 3, 4)), budgets=problem.budgets * 2)
        exact, program = pareto_dp.solve(problem), milp.solve(problem)
        assert exact.gap == 0
        assert exact.damage == pytest.approx(program.damage, rel=1e-9)


@pytest.mark.parametrize("formats", ["int{2,3,4,8}-g64", "int2..8-g32,int2..8-g128,int2..8-row"])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_pareto_dp_is_exact_on_models(formats, spread):
    rng = np.random.default_rng(0)
    problem = model_like_problem(rng, formats=formats, spread=spread, blocks=32)
    solution = pareto_dp.solve(problem)
    assert solution.gap == 0
    assert solution.damage == pytest.approx(milp.solve(problem, relative_gap=1e-7).damage, rel=1e-7)
    assert lagrangian.solve(problem).bound <= solution.damage * (1 + 1e-12)
    assert greedy.solve(problem).damage >= solution.damage * (1 - 1e-12)


def test_pareto_dp_thins_a_subset_sum_and_says_so():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.integers(0, 10**10, (30, 3)), axis=1)
    budget = int(costs.mean(axis=1).sum())
    problem = Problem((10**10 - costs).astype(float), costs[None], np.array([budget]))
    solution = pareto_dp.solve(problem, max_states=2000)
    assert problem.feasible(solution.choice)
    assert 0 < solution.gap < 1e-5
    assert solution.bound <= milp.solve(problem, time_limit=1).damage


@pytest.mark.parametrize("solve", [pareto_dp.solve, greedy.solve])
def test_one_budget_solvers_point_to_milp(solve):
    two = random_problem(np.random.default_rng(0), 3, 3, resources=2)
    with pytest.raises(UsageError, match="milp"):
        solve(two)
    fractional = Problem(np.ones((1, 2)), np.array([[[0.5, 1.0]]]), np.array([1.0]))
    with pytest.raises(UsageError, match="milp"):
        solve(fractional)


def test_whole_costs_in_floating_point_are_bytes():
    problem = random_problem(np.random.default_rng(0), 6, 4)
    floating = replace(
        problem, costs=problem.costs.astype(float), budgets=problem.budgets.astype(float)
    )
    assert pareto_dp.solve(floating).damage == pareto_dp.solve(problem).damage


def test_pareto_dp_where_the_relaxation_is_already_whole():
    damage = np.array([[1.0, 6e-108, -1.0]])
    assert pareto_dp.solve(Problem(damage, np.array([[[0, 0, 1]]]), np.array([0]))).choice == [1]


def test_infinite_budget_is_no_limit():
    problem = random_problem(np.random.default_rng(0), 6, 4)
    for solve in (pareto_dp.solve, milp.solve, lagrangian.solve, greedy.solve):
        free = replace(problem, budgets=np.array([np.inf]))
        assert solve(free).damage == pytest.approx(problem.damage.min(axis=1).sum())
