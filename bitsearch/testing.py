"""The contract suite of solvers, for bitsearch's own and for third-party ones.

    from bitsearch.testing import SolverContract

    class TestMySolver(SolverContract):
        solver = staticmethod(my_solver)
        exact = True        # claims optimality: compared with exhaustive search

pytest then collects every `test_` method. Nothing here imports pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import ClassVar

import numpy as np

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.formats import parse_formats
from bitsearch.solvers.problem import Choice, Pairs, Problem, Solution, Solver

_TOLERANCE = 1e-9


def random_problem(
    rng: np.random.Generator,
    units: int,
    candidates: int,
    *,
    resources: int = 1,
    forbidden: float = 0.0,
    tightness: float | None = None,
) -> Problem:
    """A feasible problem with unrelated damages and costs of up to ten digits.

    Args:
        rng: source of randomness.
        units: number of units.
        candidates: number of candidates.
        resources: number of budgets, all met by one hidden random choice.
        forbidden: share of candidates that are not allowed.
        tightness: position of the budgets between that choice's cost (0) and
            the highest cost (1); random if None.
    """
    damage = rng.exponential(size=(units, candidates))
    costs = rng.integers(0, 10 ** int(rng.integers(1, 11)), size=(resources, units, candidates))
    hidden = rng.integers(candidates, size=units)
    blocked = rng.random(damage.shape) < forbidden
    blocked[np.arange(units), hidden] = False
    damage[blocked] = np.inf
    needed = costs[:, np.arange(units), hidden].sum(axis=1)
    position = rng.random() if tightness is None else tightness
    budgets = needed + (position * (costs.max(axis=2).sum(axis=1) - needed)).astype(np.int64)
    return Problem(damage, costs, budgets)


def random_pairs(rng: np.random.Generator, problem: Problem, *, strength: float) -> Pairs:
    """Pair terms of a quadratic form whose diagonal is about the problem's damage.

    Args:
        rng: source of randomness.
        problem: of which damages.
        strength: from 0, none, to 1, where the form is only just convex.
    """
    damage = np.where(problem.damage < np.inf, np.abs(problem.damage), 0.0)
    units, candidates = damage.shape
    errors = rng.normal(size=(units, 1, 6)) + 0.3 * rng.normal(size=(units, candidates, 6))
    errors /= np.linalg.norm(errors, axis=2, keepdims=True)
    errors *= np.sqrt(damage)[:, :, None]
    pairs: Pairs = 2 * strength * np.einsum("ucs,vds->ucvd", errors, errors)
    return pairs


def model_like_problem(
    rng: np.random.Generator,
    *,
    blocks: int = 32,
    hidden: int = 4096,
    intermediate: int = 14336,
    kv: int = 1024,
    formats: str = "int2..8-g64,bf16",
    bits: float = 3.25,
    spread: float = 1.0,
    noise: float = 0.2,
) -> Problem:
    """Sizes of a Llama-like decoder, log-normal sensitivities, damage near 4^-bits.

    Args:
        rng: source of randomness.
        blocks: decoder blocks, seven linear units each.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        kv: width of keys and of values.
        formats: candidate formats, as `parse_formats` reads them.
        bits: budget, in bits per weight of these units.
        spread: standard deviation of the logarithm of a unit's sensitivity.
        noise: standard deviation of the logarithm of each damage around its law.
    """
    shapes = [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ] * blocks
    candidates = parse_formats(formats)
    costs = np.array([[f.bytes(*shape) for f in candidates] for shape in shapes])
    weights = np.array([rows * columns for rows, columns in shapes])
    sensitivity = np.exp(rng.normal(0, spread, len(shapes))) * weights / weights.mean()
    law = 4.0 ** (-8 * costs / weights[:, None])
    damage = sensitivity[:, None] * law * np.exp(rng.normal(0, noise, costs.shape))
    damage[:, [f.exact for f in candidates]] = 0.0
    return Problem(damage, costs[None], np.array([int(bits * weights.sum()) // 8]))


def exhaustive(problem: Problem) -> float | None:
    """The least damage of any feasible choice, by trying all; None if there is none."""
    units, candidates = problem.damage.shape
    choices = (np.array(c, np.int64) for c in product(range(candidates), repeat=units))
    return min(map(problem.total_damage, filter(problem.feasible, choices)), default=None)


class SolverContract:
    """What every solver owes its users.

    Attributes:
        solver: the solver under test.
        exact: it claims the optimum and a gap of 0.
    """

    solver: ClassVar[Solver]
    exact: ClassVar[bool] = False

    def _solve(self, problem: Problem, seed: int = 0) -> Solution:
        """Solve, and check what holds for every answer."""
        solution = type(self).solver(problem, seed=seed)
        choice = solution.choice
        assert choice.shape == (len(problem.damage),)
        assert problem.feasible(choice), "a budget, a rule or a forbidden candidate is violated"
        assert _close(solution.damage, problem.total_damage(choice))
        if solution.bound is not None:
            assert solution.bound <= solution.damage
        if self.exact:
            assert solution.gap is not None and solution.gap <= _TOLERANCE
        return solution

    def test_budget_is_kept_on_model_like_problems(self) -> None:
        """Never over budget, by a byte, at any budget."""
        for seed, bits in enumerate((2.3, 3.0, 4.5, 9.0, 17.0)):
            rng = np.random.default_rng(seed)
            self._solve(model_like_problem(rng, blocks=4, bits=bits))

    def test_budget_may_be_met_exactly(self) -> None:
        """A choice that costs the whole budget is allowed."""
        problem = Problem(
            np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[[1, 2], [1, 2]]]), np.array([4])
        )
        assert self._solve(problem).choice.tolist() == [1, 1]

    def test_bound_holds(self) -> None:
        """No feasible choice lies below the reported bound."""
        for problem in _small_problems():
            best = exhaustive(problem)
            solution = self._solve(problem)
            assert best is not None and solution.damage >= best - _TOLERANCE
            if solution.bound is not None:
                assert solution.bound <= best + _TOLERANCE * max(1.0, abs(best))

    def test_optimal_if_exact(self) -> None:
        """An exact solver agrees with exhaustive search."""
        for problem in _small_problems() if self.exact else ():
            best = exhaustive(problem)
            assert best is not None and _close(self._solve(problem).damage, best)

    def test_deterministic_for_a_seed(self) -> None:
        """The same problem and seed give the same choice."""
        problem = model_like_problem(np.random.default_rng(7), blocks=3)
        first, second = self._solve(problem, seed=3), self._solve(problem, seed=3)
        assert first.choice.tolist() == second.choice.tolist()
        assert first.bound == second.bound

    def test_inputs_are_left_alone(self) -> None:
        """Read-only arrays are enough, and stay as they were."""
        problem = model_like_problem(np.random.default_rng(1), blocks=2)
        for array in (problem.damage, problem.costs, problem.budgets):
            array.flags.writeable = False
        self._solve(problem)

    def test_order_of_units_does_not_matter(self) -> None:
        """Permuting units permutes the choice of an exact solver."""
        rng = np.random.default_rng(2)
        problem = model_like_problem(rng, blocks=3)
        order = rng.permutation(len(problem.damage))
        permuted = replace(problem, damage=problem.damage[order], costs=problem.costs[:, order])
        one, other = self._solve(problem), self._solve(permuted)
        if self.exact:
            assert one.choice[order].tolist() == other.choice.tolist()

    def test_one_unit(self) -> None:
        """The best candidate that fits."""
        problem = Problem(np.array([[3.0, 2.0, 1.0]]), np.array([[[10, 20, 30]]]), np.array([25]))
        assert self._solve(problem).choice.tolist() == [1]

    def test_one_candidate(self) -> None:
        """No decision to make."""
        problem = Problem(np.array([[3.0], [2.0]]), np.array([[[10], [20]]]), np.array([30]))
        assert self._solve(problem).choice.tolist() == [0, 0]

    def test_free_candidates(self) -> None:
        """Costs of zero everywhere are no division by zero."""
        problem = Problem(np.array([[3.0, 1.0]] * 3), np.zeros((1, 3, 2), int), np.array([0]))
        assert self._solve(problem).choice.tolist() == [1, 1, 1]

    def test_loose_budget_takes_the_least_damage(self) -> None:
        """With room for everything each unit takes its best candidate."""
        problem = random_problem(np.random.default_rng(5), 20, 5, tightness=1.0)
        assert self._solve(problem).choice.tolist() == problem.damage.argmin(axis=1).tolist()

    def test_ties_take_one_candidate(self) -> None:
        """Tied units are equal, also where one of them forbids the other's best."""
        problem = random_problem(np.random.default_rng(3), 6, 4, tightness=0.8)
        tied = replace(problem, ties=((0, 3), (1, 4, 5)))
        self._solve(tied)
        damage = problem.damage.copy()
        damage[0, :2], damage[3, 3] = np.inf, np.inf
        only = replace(problem, damage=damage, budgets=problem.costs.max(axis=2).sum(axis=1))
        assert self._solve(replace(only, ties=((0, 3),))).choice[[0, 3]].tolist() == [2, 2]

    def test_limit_on_distinct_candidates_is_kept_or_refused(self) -> None:
        """Never ignored: fewer formats, or a UsageError that names a solver."""
        problem = random_problem(np.random.default_rng(4), 6, 4, tightness=0.9)
        uniform = problem.costs.sum(axis=1).min(axis=1)
        budget = np.maximum(problem.budgets, uniform)
        for distinct in (1, 2):
            self._honoured(replace(problem, budgets=budget, distinct=distinct))

    def test_pair_terms_are_counted_or_refused(self) -> None:
        """Never ignored: the damage holds them, or a UsageError names a solver."""
        rng = np.random.default_rng(5)
        problem = random_problem(rng, 5, 3, forbidden=0.1)
        pairs = random_pairs(rng, problem, strength=0.8)
        self._honoured(replace(problem, pairs=pairs))
        self._honoured(replace(problem, pairs=pairs, ties=((1, 3),), budgets=2 * problem.budgets))

    def _honoured(self, problem: Problem) -> None:
        try:
            solution = self._solve(problem)
        except UsageError as error:
            assert "solver '" in str(error)
            return
        best = exhaustive(problem)
        assert best is not None and solution.damage >= best - _TOLERANCE
        if solution.bound is not None:
            assert solution.bound <= best + _TOLERANCE * max(1.0, abs(best))
        if self.exact:
            assert _close(solution.damage, best)

    def test_forbidden_candidates_are_not_taken(self) -> None:
        """A damage of +inf is never chosen, however cheap."""
        damage = np.array([[np.inf, 2.0, 1.0], [1.0, np.inf, np.inf]])
        costs = np.array([[[0, 5, 6], [5, 0, 0]]])
        assert self._solve(Problem(damage, costs, np.array([10]))).choice.tolist() == [1, 0]

    def test_infeasible_budget_is_refused(self) -> None:
        """The error tells the budget and the least achievable."""
        problem = Problem(np.ones((2, 2)), np.array([[[700, 800], [600, 900]]]), np.array([1234]))
        message = self._refusal(problem)
        assert "1234" in message and "1300" in message

    def test_unit_without_candidates_is_refused(self) -> None:
        """So is a tie whose members allow nothing in common."""
        costs = np.ones((1, 2, 2), int)
        budget = np.array([100])
        self._refusal(Problem(np.array([[1.0, 1.0], [np.inf, np.inf]]), costs, budget))
        apart = np.array([[1.0, np.inf], [np.inf, 1.0]])
        self._refusal(Problem(apart, costs, budget, ties=((0, 1),)))

    def _refusal(self, problem: Problem) -> str:
        try:
            type(self).solver(problem, seed=0)
        except InfeasibleBudget as error:
            return str(error)
        raise AssertionError("an infeasible problem was not refused with InfeasibleBudget")

    def test_equal_damages(self) -> None:
        """Where nothing can be gained any feasible choice will do."""
        problem = random_problem(np.random.default_rng(6), 12, 4)
        flat = replace(problem, damage=np.full(problem.damage.shape, 2.5))
        assert _close(self._solve(flat).damage, 12 * 2.5)

    def test_zero_and_negative_damages(self) -> None:
        """Measured damages may be noise around zero."""
        problem = random_problem(np.random.default_rng(8), 8, 4)
        self._solve(replace(problem, damage=problem.damage - 1.0))
        self._solve(replace(problem, damage=np.zeros_like(problem.damage)))

    def test_dominated_candidate_changes_nothing(self) -> None:
        """An extra candidate worse in both respects is not worth taking."""
        problem = model_like_problem(np.random.default_rng(9), blocks=2)
        worse = problem.damage.max(axis=1, keepdims=True) + 1.0
        costly = problem.costs.max(axis=2, keepdims=True) + 1
        extended = replace(
            problem,
            damage=np.hstack([problem.damage, worse]),
            costs=np.concatenate([problem.costs, costly], axis=2),
        )
        assert _close(self._solve(extended).damage, self._solve(problem).damage)

    def test_scaling_damages_changes_nothing(self) -> None:
        """The unit of damage is arbitrary: the choice stays."""
        problem = model_like_problem(np.random.default_rng(10), blocks=2)
        choice = self._solve(problem).choice
        for factor in (2.0**-40, 2.0**40):
            scaled = replace(problem, damage=problem.damage * factor)
            if self.exact:
                assert self._solve(scaled).choice.tolist() == choice.tolist()
            else:
                assert _close(self._solve(scaled).damage, factor * problem.total_damage(choice))

    def test_larger_budget_never_hurts_if_exact(self) -> None:
        """More bytes, no more damage."""
        problem = model_like_problem(np.random.default_rng(11), blocks=2)
        budgets = np.linspace(0.75, 1.5, 16) * problem.budgets[0]
        damages = [
            self._solve(replace(problem, budgets=np.array([int(budget)]))).damage
            for budget in budgets
        ]
        if self.exact:
            assert all(b <= a * (1 + _TOLERANCE) for a, b in pairwise(damages))


def _small_problems() -> Iterator[Problem]:
    """Random problems that exhaustive search can check, some tied, some with equal costs."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        units, candidates = int(rng.integers(1, 6)), int(rng.integers(1, 5))
        problem = random_problem(rng, units, candidates, forbidden=0.15)
        if seed % 3 == 0:
            problem = replace(problem, costs=problem.costs[:, [0] * units])
        if seed % 4 == 0 and units > 1:
            problem = replace(problem, ties=((0, units - 1),))
        if exhaustive(problem) is not None:
            yield problem


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other), 1e-30)


__all__ = [
    "Choice",
    "SolverContract",
    "exhaustive",
    "model_like_problem",
    "random_pairs",
    "random_problem",
]
