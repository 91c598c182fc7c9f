"""Level-switch evolution: where it starts, what it spends, what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitsearch.solvers import evolution, pareto_dp
from bitsearch.solvers.ladders import make_ladders
from bitsearch.solvers.problem import Choice, Problem
from bitsearch.testing import exhaustive, model_like_problem, random_problem
from bitsearch.testing_measured import SyntheticLoss

TEXT = 80


class Watched(SyntheticLoss):
    """Notes the sizes of calls, and the best loss on all text by tokens spent."""

    def __init__(self, problem: Problem, strength: float = 0.5) -> None:
        super().__init__(problem, strength)
        self.calls: list[tuple[int, list[int]]] = []
        self.path: list[tuple[int, float]] = []

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> Any:
        found = super().__call__(choices, pieces, base)
        self.calls.append((len(choices), list(pieces)))
        self.path.append((self.spent, self.best))
        return found


def problem_of(bits: float = 2.7) -> Problem:
    """Two blocks, at few bits."""
    return model_like_problem(
        np.random.default_rng(3), blocks=2, hidden=64, intermediate=160, kv=32, bits=bits
    )


def tokens_to(loss: Watched, goal: float) -> float:
    """Tokens spent until the loss on all text is no more than that."""
    return next((spent for spent, best in loss.path if best <= goal), np.inf)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_from_exact_needs_a_fifth_of_the_tokens_of_from_uniform(seed):
    problem = problem_of()
    slow, quick = Watched(problem), Watched(problem)
    evolution.solve(problem, slow, tokens=40 * TEXT, seed=seed, start=evolution.from_uniform)
    evolution.solve(problem, quick, tokens=40 * TEXT, seed=seed)
    assert tokens_to(quick, slow.best) <= slow.spent / 5


def test_it_is_no_worse_than_the_additive_optimum():
    problem = problem_of()
    loss = Watched(problem, strength=3.0)
    found = evolution.solve(problem, loss, tokens=60 * TEXT, seed=0)
    exact = pareto_dp.solve(problem).choice
    assert loss.exact(found.choice).mean() < loss.exact(exact).mean()


def test_few_survive_to_more_text():
    loss = Watched(problem_of())
    evolution.solve(problem_of(), loss, tokens=20 * TEXT, seed=0)
    generation = [(count, len(pieces)) for count, pieces in loss.calls[3:6]]
    assert generation == [(16, 1), (4, 2), (1, 8)]


def test_text_is_drawn_anew_each_generation():
    loss = Watched(problem_of())
    evolution.solve(problem_of(), loss, tokens=40 * TEXT, seed=0)
    assert len({pieces[0] for count, pieces in loss.calls if count == 16}) > 2


def test_small_problems_end_at_the_best_policy():
    """With enough tokens nothing better is left among all policies."""
    for seed in range(2):
        problem = random_problem(np.random.default_rng(seed), 4, 3, tightness=0.4)
        loss = Watched(problem, strength=0.0)
        evolution.solve(problem, loss, tokens=1000 * TEXT, seed=seed)
        share = Problem(problem.damage * loss._share.mean(axis=2), problem.costs, problem.budgets)
        assert loss.best == pytest.approx(exhaustive(share))


def test_the_uniform_start_is_uniform_up_to_what_is_left_over():
    problem = problem_of(3.5)
    ladders = make_ladders(problem, "test")
    (levels,) = evolution.from_uniform(ladders, np.random.default_rng(0))
    assert problem.feasible(ladders.choice(levels))
    assert np.unique(levels).size <= 3 and (levels >= 1).all()


def test_the_exact_start_holds_the_optimum_and_optima_without_low_rungs():
    problem = problem_of(3.5)
    ladders = make_ladders(problem, "test")
    found = evolution.from_exact(ladders, np.random.default_rng(0))
    assert ladders.choice(found[0]).tolist() == pareto_dp.solve(problem).choice.tolist()
    assert max(levels.min() for levels in found) == 1  # no unit in the lowest rung
    assert all(problem.feasible(ladders.choice(levels)) for levels in found)
