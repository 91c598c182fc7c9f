"""The solver for very many units: same answers as the exact one, few passes."""

from dataclasses import replace

import numpy as np
import pytest

from bitsearch.errors import UsageError
from bitsearch.solvers import lagrangian, large, pareto_dp
from bitsearch.solvers.problem import Problem
from bitsearch.testing import random_problem

BITS = np.array([2, 3, 4, 8])


def groups(units, kind, seed=0):
    """Groups of weights with log-normal sensitivities, at 3.3 bits."""
    rng = np.random.default_rng(seed)
    size = rng.integers(100, 10_000, units) if kind == "sizes vary" else np.full(units, 128)
    damage = np.exp(rng.normal(0, 1.5, (units, 1))) * size[:, None] * 4.0**-BITS
    if kind == "all equal":
        damage = np.tile(4.0**-BITS, (units, 1))
    elif kind == "three classes":
        damage = rng.choice([1.0, 2.0, 4.0], (units, 1)) * 4.0**-BITS
    else:
        damage *= np.exp(rng.normal(0, 0.2, damage.shape))
    costs = size[:, None] * BITS // 8
    return Problem(damage, costs[None], np.array([int(size.sum() * 3.3 / 8)]))


@pytest.fixture
def small_limits(monkeypatch):
    """Make some hundred units count as very many."""
    monkeypatch.setattr(large, "CHUNK", 64)
    monkeypatch.setattr(large, "SAMPLE", 40)
    monkeypatch.setattr(large, "UNDECIDED", 40)
    monkeypatch.setattr(large, "CORE", 30)


@pytest.mark.parametrize("kind", ["sizes equal", "sizes vary", "all equal", "three classes"])
@pytest.mark.parametrize("seed", range(8))
def test_same_as_exact(kind, seed, small_limits):
    problem = groups(700, kind, seed)
    best = pareto_dp.solve(problem)
    solution = large.solve(problem, seed=seed)
    assert problem.feasible(solution.choice)
    assert solution.bound <= best.damage * (1 + 1e-12)
    assert best.damage <= solution.damage * (1 + 1e-12)
    assert solution.gap < 1e-3
    if kind != "sizes vary":
        assert solution.damage == pytest.approx(best.damage, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_bound_holds_on_unrelated_damages(seed, small_limits):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 300, 5, forbidden=0.2)
    if seed % 2:
        problem = replace(problem, ties=((0, 299), (7, 8, 9)), budgets=problem.budgets * 2)
    best = pareto_dp.solve(problem)
    solution = large.solve(problem, seed=seed)
    assert problem.feasible(solution.choice)
    assert solution.bound <= best.damage * (1 + 1e-12)
    assert best.damage <= solution.damage * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["sizes equal", "sizes vary", "all equal", "three classes"])
def test_two_hundred_thousand_units(kind):
    problem = groups(200_000, kind)
    solution = large.solve(problem)
    assert problem.feasible(solution.choice)
    assert solution.gap < 1e-8
    assert solution.damage >= lagrangian_bound(problem) * (1 - 1e-12)


def lagrangian_bound(problem):
    _, price = lagrangian.relax(problem.damage, problem.costs[0], int(problem.budgets[0]))
    priced = (problem.damage + price * problem.costs[0]).min(axis=1).sum()
    return priced - price * problem.budgets[0]


def test_narrow_types_and_shared_costs_give_the_same_choice():
    wide = groups(120_000, "sizes equal")
    shared = np.broadcast_to(wide.costs[:, :1].astype(np.int32), wide.costs.shape)
    narrow = Problem(wide.damage.astype(np.float32), shared, wide.budgets)
    rounded = replace(wide, damage=narrow.damage.astype(np.float64))
    assert large.solve(narrow).choice.tolist() == large.solve(rounded).choice.tolist()


def test_any_seed_finds_the_same_damage():
    problem = groups(150_000, "sizes vary")
    damages = {large.solve(problem, seed=seed).damage for seed in range(3)}
    assert max(damages) == pytest.approx(min(damages), rel=1e-12)


def test_several_budgets_are_refused():
    with pytest.raises(UsageError, match="milp"):
        large.solve(random_problem(np.random.default_rng(0), 3, 3, resources=2))
