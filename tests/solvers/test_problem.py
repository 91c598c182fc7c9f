"""What a problem refuses, and the order of damages over bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitsearch.errors import BadInput, UsageError
from bitsearch.solvers.monotone import monotone
from bitsearch.solvers.problem import Problem, Solution
from bitsearch.solvers.ties import merge_ties
from bitsearch.testing import random_pairs, random_problem

DAMAGE = np.array([[2.0, 1.0], [3.0, np.inf]])
COSTS = np.array([[[1, 2], [3, 4]]])
BUDGET = np.array([10])


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_damage_must_be_a_number(bad):
    damage = DAMAGE.copy()
    damage[1, 0] = bad
    with pytest.raises(BadInput, match="unit 1, candidate 0"):
        Problem(damage, COSTS, BUDGET)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_costs_are_finite_and_not_negative(bad):
    costs = COSTS.astype(float)
    costs[0, 1, 1] = bad
    with pytest.raises(BadInput, match="unit 1, candidate 1"):
        Problem(DAMAGE, costs, BUDGET)


def test_shapes_must_fit():
    with pytest.raises(UsageError, match="one at least"):
        Problem(np.zeros((0, 2)), np.zeros((1, 0, 2)), BUDGET)
    with pytest.raises(UsageError, match="resources, units, candidates"):
        Problem(DAMAGE, COSTS[0], BUDGET)
    with pytest.raises(UsageError, match="one budget per resource"):
        Problem(DAMAGE, COSTS, np.array([1, 2]))
    with pytest.raises(UsageError, match="NaN"):
        Problem(DAMAGE, COSTS, np.array([np.nan]))


@pytest.mark.parametrize("ties", [((0, 2),), ((-1, 0),), ((0, 1), (1,)), ((0, 0),)])
def test_ties_are_disjoint_sets_of_units(ties):
    with pytest.raises(UsageError, match="ties"):
        Problem(DAMAGE, COSTS, BUDGET, ties)


def test_feasible_checks_budget_tie_and_permission():
    problem = Problem(DAMAGE, COSTS, np.array([5]), ((0, 1),))
    assert problem.feasible(np.array([0, 0]))
    assert not problem.feasible(np.array([1, 0]))
    assert not problem.feasible(np.array([1, 1]))
    assert not Problem(DAMAGE, COSTS, np.array([3])).feasible(np.array([0, 0]))


def test_feasible_counts_distinct_candidates():
    problem = Problem(DAMAGE, COSTS, BUDGET, distinct=1)
    assert problem.feasible(np.array([0, 0]))
    assert not problem.feasible(np.array([1, 0]))
    with pytest.raises(UsageError, match="at most 0 distinct"):
        Problem(DAMAGE, COSTS, BUDGET, distinct=0)


def test_pair_terms_count_once_and_never_within_a_unit():
    pairs = np.full((2, 2, 2, 2), 10.0)
    pairs[0, 1, 1, 0] = pairs[1, 0, 0, 1] = 0.5
    problem = Problem(DAMAGE, COSTS, BUDGET, pairs=pairs)
    assert problem.total_damage(np.array([1, 0])) == 1.0 + 3.0 + 0.5
    with pytest.raises(UsageError, match="symmetric"):
        Problem(DAMAGE, COSTS, BUDGET, pairs=pairs * np.array([1.0, 2.0]))
    with pytest.raises(UsageError, match="pairs have shape"):
        Problem(DAMAGE, COSTS, BUDGET, pairs=pairs[:1])
    pairs[0, 0, 1, 1] = np.nan
    with pytest.raises(BadInput, match="pair term"):
        Problem(DAMAGE, COSTS, BUDGET, pairs=pairs)


@pytest.mark.parametrize("ties", [((0, 2),), ((3, 1), (0, 2, 4)), ((0, 1, 2, 3, 4),)])
def test_merged_ties_keep_the_damage_of_every_choice(ties):
    rng = np.random.default_rng(0)
    problem = random_problem(rng, 5, 3, tightness=1.0)
    pairs = random_pairs(rng, problem, strength=1.0)
    problem = Problem(problem.damage, problem.costs, problem.budgets, ties, pairs=pairs)
    merged, member = merge_ties(problem)
    for choice in np.ndindex(*[3] * len(merged.damage)):
        whole = np.array(choice)[member]
        assert merged.total_damage(np.array(choice)) == pytest.approx(problem.total_damage(whole))


def test_totals_do_not_overflow_narrow_types():
    damage = np.full((4, 1), 2.0**24, np.float32) + np.float32(2)
    costs = np.full((1, 4, 1), 2**30, np.int32)
    problem = Problem(damage, costs, np.array([2**33]))
    choice = np.zeros(4, np.int64)
    assert problem.total_costs(choice).tolist() == [2**32]
    assert problem.total_damage(choice) == 4 * (2**24 + 2)


def test_gap_is_relative_to_the_damage():
    choice = np.zeros(1, np.int64)
    assert Solution(choice, 4.0, 3.0).gap == 0.25
    assert Solution(choice, 4.0, 4.0).gap == 0
    assert Solution(choice, 0.0, 0.0).gap == 0
    assert Solution(choice, 4.0, None).gap is None


def test_monotone_takes_the_running_minimum_over_bytes():
    damage = np.array([[1.0, 5.0, 2.0, np.inf, 0.5]])
    costs = np.array([[20, 10, 30, 5, 40]])
    assert monotone(damage, costs).tolist() == [[1.0, 5.0, 1.0, np.inf, 0.5]]


def test_monotone_leaves_equal_costs_alone():
    damage = np.array([[3.0, 2.0, 2.5]])
    costs = np.array([[10, 10, 20]])
    assert monotone(damage, costs).tolist() == [[3.0, 2.0, 2.0]]


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(float, (3, 5), elements=st.one_of(st.floats(-9, 9), st.just(np.inf))),
    hnp.arrays(np.int64, (3, 5), elements=st.integers(0, 4)),
)
def test_monotone_is_the_least_damage_of_any_cheaper_candidate(damage, costs):
    result = monotone(damage, costs)
    for unit, candidate in np.ndindex(damage.shape):
        own = damage[unit, candidate]
        cheaper = damage[unit, costs[unit] < costs[unit, candidate]]
        expected = own if np.isinf(own) else min(own, cheaper.min(initial=np.inf))
        assert result[unit, candidate] == expected
