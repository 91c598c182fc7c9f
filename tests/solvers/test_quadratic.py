"""Pair terms: brute force, the bound, and that they are worth something."""

from dataclasses import replace

import numpy as np
import pytest

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.solvers import quadratic
from bitsearch.solvers.problem import Problem
from bitsearch.solvers.ties import merge_ties
from bitsearch.testing import exhaustive, model_like_problem, random_pairs, random_problem


def small(seed):
    """A problem for exhaustive search: convex or not, tied or not, one budget or two."""
    rng = np.random.default_rng(seed)
    units, candidates = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    problem = random_problem(rng, units, candidates, forbidden=0.1, resources=1 + seed % 2)
    pairs = random_pairs(rng, problem, strength=rng.random())
    if seed % 3 == 0:
        free = rng.normal(size=(units * candidates, units * candidates))
        pairs = (free + free.T).reshape(pairs.shape) / 3
    problem = replace(problem, pairs=pairs)
    if seed % 4 == 0 and units > 2:
        problem = replace(problem, ties=((0, 2),))
    return problem


@pytest.mark.parametrize("limit", [0, 10**6], ids=["local search", "integer program"])
def test_brute_force(limit, monkeypatch):
    monkeypatch.setattr(quadratic, "LINEARISED", limit)
    monkeypatch.setattr(quadratic, "MAX_STEPS", 30)
    missed = compared = 0
    for seed in range(40):
        problem = small(seed)
        best = exhaustive(problem)
        if best is None:
            with pytest.raises(InfeasibleBudget):
                quadratic.solve(problem)
            continue
        solution = quadratic.solve(problem)
        assert problem.feasible(solution.choice)
        assert solution.damage == pytest.approx(problem.total_damage(solution.choice))
        assert solution.bound <= best + 1e-9
        compared += 1
        missed += solution.damage > best + 1e-9 * max(1, abs(best))
        if limit:
            assert solution.gap < 1e-8
            continue
        # before it is cut to the damage found, which would hide a bound too high
        form = quadratic._formed(merge_ties(problem)[0])
        for convex in form.convex:
            assert np.linalg.eigvalsh(convex)[0] > -1e-9 * np.abs(convex).max()
            assert quadratic._relaxed(form, convex, 0)[1] <= best + 1e-9
    assert compared > 30
    assert missed <= (0 if limit else 2)


def test_units_whose_errors_cancel_are_taken_together():
    # alone each unit is best at candidate 1; together their errors at 0 cancel
    damage = np.array([[1.0, 0.6], [1.0, 0.6]])
    pairs = np.zeros((2, 2, 2, 2))
    pairs[0, 0, 1, 0] = pairs[1, 0, 0, 0] = -1.9
    problem = Problem(damage, np.ones((1, 2, 2), int), np.array([2]))
    assert quadratic.solve(problem).choice.tolist() == [1, 1]
    solution = quadratic.solve(replace(problem, pairs=pairs))
    assert solution.choice.tolist() == [0, 0]
    assert solution.damage == pytest.approx(0.1)


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_many_units_with_a_certified_gap(strength):
    rng = np.random.default_rng(2)
    problem = model_like_problem(rng, blocks=6, bits=3.0, formats="int2..5-g64")
    problem = replace(problem, pairs=random_pairs(rng, problem, strength=strength))
    solution = quadratic.solve(problem)
    assert problem.feasible(solution.choice)
    assert solution.gap < 0.02
    additive = quadratic.solve(replace(problem, pairs=None))
    assert additive.gap == 0
    assert solution.damage < problem.total_damage(additive.choice)
    assert quadratic.solve(problem).choice.tolist() == solution.choice.tolist()


def test_sampled_neighbours_still_improve(monkeypatch):
    monkeypatch.setattr(quadratic, "NEIGHBOURS", 16)
    rng = np.random.default_rng(3)
    problem = model_like_problem(rng, blocks=2, bits=3.0, formats="int2..5-g64")
    problem = replace(problem, pairs=random_pairs(rng, problem, strength=0.5))
    solution = quadratic.solve(problem, seed=1)
    assert problem.feasible(solution.choice) and solution.gap < 0.05


def test_no_pair_terms_are_the_additive_problem():
    problem = random_problem(np.random.default_rng(0), 8, 4)
    zero = replace(problem, pairs=np.zeros((8, 4, 8, 4)))
    additive, quadratic_ = quadratic.solve(problem), quadratic.solve(zero)
    assert quadratic_.choice.tolist() == additive.choice.tolist()
    assert quadratic_.gap < 1e-5


def test_what_it_cannot_take(monkeypatch):
    rng = np.random.default_rng(0)
    problem = random_problem(rng, 4, 3, tightness=1.0)
    problem = replace(problem, pairs=random_pairs(rng, problem, strength=0.5))
    with pytest.raises(UsageError, match="distinct"):
        quadratic.solve(replace(problem, distinct=2))
    monkeypatch.setattr(quadratic, "MAX_CELLS", 11)
    monkeypatch.setattr(quadratic, "LINEARISED", 0)
    with pytest.raises(UsageError, match="up to 11 candidates"):
        quadratic.solve(problem)
