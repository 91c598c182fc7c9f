"""The contract of solvers that call the real loss.

An additive solver sees a table. A measured one proposes policies, is told what
each of them loses on calibration text, and spends a given number of tokens on
it. It is registered like any other solver; its `loss` parameter tells it apart.
It certifies no bound.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers.problem import Choice, Problem, Solution

DEPTHS = 3  # parts of depth that coarse units are made of


class Loss(Protocol):
    """Measures policies on calibration text, which is cut into pieces of equal length."""

    @property
    def pieces(self) -> int:
        """Number of pieces."""

    @property
    def piece_tokens(self) -> int:
        """Tokens of each piece."""

    @property
    def spent(self) -> int:
        """Tokens measured so far; a policy counts once on each piece."""

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> NDArray[np.float64]:
        """Mean KL of policies on pieces, in nats a token.

        Args:
            choices: feasible policies, each of shape (units,).
            pieces: indices of the pieces.
            base: a policy that the others resemble. It is measured on the same
                pieces, and speeds up the others.

        Returns:
            (choices, pieces), finite.
        """


@dataclass(frozen=True, slots=True)
class Traits:
    """What a solver may know of the units besides their tables.

    Attributes:
        kind: (units,) a number for each kind of unit, e.g. of place in the block.
        depth: (units,) place between the first block, 0, and the last, 1.
    """

    kind: NDArray[np.int64]
    depth: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StudyPlace:
    """Where a study is kept, so that it can be resumed and shared.

    Attributes:
        storage: URL of a database, e.g. `sqlite:////folder/study.db` or
            `postgresql://user@host/name`.
        name: of the study; it must change with everything that changes the loss.
        worker: name of who works on it. Trials that a killed worker left are
            finished by the next one of the same name.
    """

    storage: str
    name: str
    worker: str


class MeasuredSolver(Protocol):
    """Spends tokens on the real loss; deterministic for a seed and a loss.

    Every policy given to `loss` is feasible. The one returned was measured on
    all pieces, and no other that was did better.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: the solver cannot handle such a problem.
    """

    def __call__(
        self,
        problem: Problem,
        loss: Loss,
        *,
        tokens: int,
        seed: int = 0,
        traits: Traits | None = None,
        study: StudyPlace | None = None,
    ) -> Solution: ...


def needs_loss(solver: Callable[..., Any]) -> bool:
    """Whether a registered solver is a measured one."""
    return "loss" in inspect.signature(solver).parameters


class _Unasked:
    """A loss that is never reached."""

    pieces = piece_tokens = 1
    spent = 0

    class Reached(Exception):
        """The solver has accepted the problem."""

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> NDArray[np.float64]:
        raise self.Reached


def refuse_early(solver: MeasuredSolver, problem: Problem) -> None:
    """Let a solver refuse a problem before anything is measured: run it to its first proposal.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: the solver cannot handle such a problem.
    """
    with suppress(_Unasked.Reached):
        solver(problem, _Unasked(), tokens=1)


def no_traits(units: int) -> Traits:
    """All units of one kind, evenly spread over depth."""
    return Traits(np.zeros(units, np.int64), np.linspace(0, 1, units))


def coarse_units(member: NDArray[np.int64], traits: Traits) -> NDArray[np.int64]:
    """Coarse units: those of one kind in one part of depth.

    Args:
        member: (units,) merged unit of each, as `merge_ties` gives it.
        traits: of the units before merging.

    Returns:
        (merged units,) coarse unit of each, numbered from 0.
    """
    part = np.minimum((traits.depth * DEPTHS).astype(np.int64), DEPTHS - 1)
    # a merged unit is known by the first of its members
    first = np.unique(member, return_index=True)[1]
    labels = np.stack([traits.kind, part])[:, first]
    group: NDArray[np.int64] = np.unique(labels, axis=1, return_inverse=True)[1].ravel()
    return group


def measured_solution(problem: Problem, choice: Choice) -> Solution:
    """The solution of a measured solver: no bound."""
    return Solution(choice, problem.total_damage(choice), None)


def everywhere(loss: Loss, choice: Choice) -> float:
    """Mean KL of one policy on all pieces."""
    return float(loss([choice], range(loss.pieces)).mean())
