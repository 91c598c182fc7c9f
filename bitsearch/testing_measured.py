"""The contract suite of measured solvers, for bitsearch's own and for third-party ones.

    from bitsearch.testing_measured import MeasuredSolverContract

    class TestMySolver(MeasuredSolverContract):
        solver = staticmethod(my_solver)

The loss is synthetic: the table's damages, terms between neighbouring units that
no table shows, and a share that differs from piece to piece. pytest collects
every `test_` method. Nothing here imports pytest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers.measured import MeasuredSolver, StudyPlace
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.testing import model_like_problem, random_problem

_PIECES, _PIECE_TOKENS = 8, 10
_TEXT = _PIECES * _PIECE_TOKENS


class SyntheticLoss:
    """A loss that is not additive, and refuses infeasible proposals.

    Attributes:
        pieces: pieces of its text.
        piece_tokens: tokens of each.
        spent: tokens of distinct policies and pieces asked for.
        asked: every (policy, piece) in order.
        best: least mean over all pieces of any policy that was measured on all.
    """

    def __init__(self, problem: Problem, strength: float = 0.5) -> None:
        self.pieces, self.piece_tokens, self.spent = _PIECES, _PIECE_TOKENS, 0
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self.best = np.inf
        self._problem = problem
        self._strength = strength
        self._known: dict[tuple[int, ...], set[int]] = {}
        rng = np.random.default_rng(0)
        units, candidates = problem.damage.shape
        self._share = np.exp(rng.normal(0, 0.3, (units, candidates, _PIECES)))

    def exact(self, choice: Choice) -> NDArray[np.float64]:
        """(pieces,) loss of a policy."""
        rows = np.arange(len(choice))
        alone = np.asarray(self._problem.damage, np.float64)[rows, choice][:, None]
        root = np.sqrt(np.maximum(alone * self._share[rows, choice], 0))
        together = self._strength * (root[1:] * root[:-1]).sum(axis=0)
        found: NDArray[np.float64] = (root**2).sum(axis=0) + together
        return found

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> NDArray[np.float64]:
        """(choices, pieces) losses."""
        for choice in [*choices, *([] if base is None else [base])]:
            assert choice.shape == (len(self._problem.damage),)
            assert self._problem.feasible(choice), "an infeasible policy was proposed"
            seen = self._known.setdefault(tuple(choice.tolist()), set())
            for piece in pieces:
                assert 0 <= piece < _PIECES
                self.asked.append((tuple(choice.tolist()), piece))
                self.spent += (piece not in seen) * _PIECE_TOKENS
                seen.add(piece)
            if len(seen) == _PIECES:
                self.best = min(self.best, float(self.exact(choice).mean()))
        return np.array([self.exact(choice)[list(pieces)] for choice in choices])


class MeasuredSolverContract:
    """What every solver that calls a loss owes its users.

    Attributes:
        solver: the solver under test.
        passes: tokens that the tests give it, in passes over the text.
    """

    solver: ClassVar[MeasuredSolver]
    passes: ClassVar[int] = 14

    def _solve(
        self, problem: Problem, *, seed: int = 0, passes: int = 0, study: StudyPlace | None = None
    ) -> tuple[Solution, SyntheticLoss]:
        """Solve, and check what holds for every answer."""
        loss = SyntheticLoss(problem)
        tokens = (passes or self.passes) * _TEXT
        solution = type(self).solver(problem, loss, tokens=tokens, seed=seed, study=study)
        choice = solution.choice
        assert problem.feasible(choice), "a budget, a tie or a forbidden candidate is violated"
        assert solution.bound is None, "nothing bounds a measured loss"
        assert np.isclose(solution.damage, problem.total_damage(choice))
        if study is None:
            pieces = {piece for policy, piece in loss.asked if policy == tuple(choice.tolist())}
            assert len(pieces) == _PIECES, "the answer was not measured on all text"
            assert np.isclose(loss.exact(choice).mean(), loss.best), "a better policy was measured"
        return solution, loss

    def test_proposals_keep_the_budget(self) -> None:
        """Never over budget, by a byte, at any budget."""
        for seed, bits in enumerate((2.5, 3.0, 9.0)):
            self._solve(_problem(seed, bits))

    def test_deterministic_for_a_seed(self) -> None:
        """The same problem, loss and seed give the same proposals in the same order."""
        problem = _problem(3, 3.0)
        assert self._solve(problem, seed=5)[1].asked == self._solve(problem, seed=5)[1].asked

    def test_tokens_are_a_limit(self) -> None:
        """Spending stops soon after the limit: a generation, or a few first policies."""
        for passes in (1, self.passes):
            assert self._solve(_problem(4, 3.0), passes=passes)[1].spent <= (passes + 8) * _TEXT

    def test_more_tokens_never_hurt(self) -> None:
        """A longer search begins like the shorter one."""
        problem = _problem(6, 2.6)
        losses = [
            loss.exact(solution.choice).mean()
            for solution, loss in (
                self._solve(problem, passes=passes) for passes in (2, self.passes // 2, self.passes)
            )
        ]
        assert losses == sorted(losses, reverse=True)

    def test_a_study_changes_nothing(self) -> None:
        """Kept in a database and opened again, the answer is the same, and is free."""
        problem = _problem(7, 3.0)
        alone = self._solve(problem, passes=5)[0]
        with TemporaryDirectory() as folder:
            place = StudyPlace(f"sqlite:///{Path(folder) / 'study.db'}", "contract", "one")
            for _ in range(2):
                kept = self._solve(problem, passes=5, study=place)[0]
                assert kept.choice.tolist() == alone.choice.tolist()

    def test_inputs_are_left_alone(self) -> None:
        """Read-only arrays are enough, and stay as they were."""
        problem = _problem(1, 3.0)
        for array in (problem.damage, problem.costs, problem.budgets):
            array.flags.writeable = False
        self._solve(problem, passes=2)

    def test_one_unit(self) -> None:
        """Some candidate that fits."""
        problem = Problem(np.array([[3.0, 2.0, 1.0]]), np.array([[[10, 20, 30]]]), np.array([25]))
        assert self._solve(problem)[0].choice.tolist() == [1]

    def test_one_candidate(self) -> None:
        """No decision to make."""
        problem = Problem(np.array([[3.0], [2.0]]), np.array([[[10], [20]]]), np.array([30]))
        assert self._solve(problem)[0].choice.tolist() == [0, 0]

    def test_ties_take_one_candidate(self) -> None:
        """Tied units are equal in every proposal."""
        problem = random_problem(np.random.default_rng(3), 6, 4, tightness=0.8)
        self._solve(replace(problem, ties=((0, 3), (1, 4, 5))), passes=3)

    def test_forbidden_candidates_are_not_proposed(self) -> None:
        """A damage of +inf is never measured, however cheap."""
        rng = np.random.default_rng(8)
        self._solve(random_problem(rng, 6, 5, forbidden=0.4, tightness=0.5), passes=3)

    def test_equal_damages(self) -> None:
        """A table that knows nothing is no obstacle."""
        problem = random_problem(np.random.default_rng(6), 8, 4)
        self._solve(replace(problem, damage=np.zeros(problem.damage.shape)), passes=3)

    def test_infeasible_budget_is_refused(self) -> None:
        """Before anything is measured; the error tells the least achievable."""
        problem = Problem(np.ones((2, 2)), np.array([[[700, 800], [600, 900]]]), np.array([1234]))
        loss = SyntheticLoss(problem)
        try:
            type(self).solver(problem, loss, tokens=_TEXT)
        except InfeasibleBudget as error:
            assert "1234" in str(error) and "1300" in str(error)
        else:
            raise AssertionError("an infeasible problem was not refused with InfeasibleBudget")
        assert not loss.asked


def _problem(seed: int, bits: float) -> Problem:
    """A small model whose units differ in size."""
    return model_like_problem(
        np.random.default_rng(seed), blocks=2, hidden=64, intermediate=160, kv=32, bits=bits
    )


__all__ = ["MeasuredSolverContract", "SyntheticLoss"]
