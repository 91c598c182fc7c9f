"""Policies are brought back to the budget, across units of unequal size."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsearch.solvers.ladders import make_ladders, repaired
from bitsearch.solvers.problem import Problem
from bitsearch.testing import random_problem


def problem_of(seed: int, tightness: float) -> Problem:
    """Five units, one of them with little choice."""
    rng = np.random.default_rng(seed)
    return random_problem(rng, 5, 4, forbidden=0.2, tightness=tightness)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0, 1), kept=st.sets(st.integers(0, 4)))
def test_repair_keeps_the_budget_and_spends_it(seed, tightness, kept):
    problem = problem_of(seed, tightness)
    ladders = make_ladders(problem, "test")
    rng = np.random.default_rng(seed)
    start = rng.integers(ladders.top + 1)
    levels = repaired(ladders, start, rng, kept)
    assert problem.feasible(ladders.choice(levels))
    for unit in set(range(5)) - kept:
        if levels[unit] < ladders.top[unit]:
            higher = levels.copy()
            higher[unit] += 1
            assert ladders.total(higher) > ladders.budget, "a step that fits was not taken"
    floor = np.where(np.isin(np.arange(5), list(kept)), start, 0)
    if ladders.total(floor) <= ladders.budget:
        assert levels[list(kept)].tolist() == start[list(kept)].tolist()


def test_levels_and_choices_are_inverse():
    ladders = make_ladders(problem_of(3, 0.5), "test")
    levels = np.random.default_rng(0).integers(ladders.top + 1)
    choice = ladders.merged_choice(levels)
    assert ladders.levels(choice).tolist() == levels.tolist()
    assert ladders.total(levels) == ladders.problem.total_costs(choice)[0]


def test_rungs_rise_in_bytes():
    ladders = make_ladders(problem_of(4, 0.5), "test")
    assert all((np.diff(sizes) >= 0).all() for sizes in ladders.bytes)
    allowed = np.isfinite(ladders.problem.damage)
    assert [len(rungs) for rungs in ladders.rungs] == allowed.sum(axis=1).tolist()
