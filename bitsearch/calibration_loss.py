"""The real loss for measured solvers: KL on calibration text, remembered across runs.

Every measured loss goes to `losses.journal`. A search that was interrupted is
repeated from its start: what it measured before is read back, bit for bit, and
so it makes the same decisions.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from bitsearch.session import Session
from bitsearch.solvers.measured import Loss, MeasuredSolver, StudyPlace, Traits
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.space import Space

if TYPE_CHECKING:
    from bitsearch.objectives.replay import Replay

PASSES = 64  # over the calibration text, unless the user says how many tokens
_WORST_KL = 1e6  # of a destroyed model: finite, so that files are valid JSON

Progress = Callable[[str, int, int], None]


class CalibrationLoss:
    """Losses of policies on the run's calibration text; see `solvers.measured.Loss`.

    Attributes:
        pieces: number of pieces of the text.
        piece_tokens: tokens of each.
        spent: tokens asked for so far, those read back from an earlier run included.
        replay: what measures.
    """

    def __init__(self, session: Session, replay: Replay, done: Callable[[int], None]) -> None:
        self.replay = replay
        self.pieces, self.piece_tokens, self.spent = replay.pieces, replay.piece_tokens, 0
        self._done = done
        self._names = [candidate.name for candidate in session.space.candidates]
        self._corpus = session.corpora["calibration"].sha256
        self._journal = session.run.journal("losses.journal")
        self._known = {
            (record["policy"], piece): kl
            for record in self._journal.records
            if (record["corpus"], record["piece_tokens"]) == (self._corpus, self.piece_tokens)
            for piece, kl in zip(record["pieces"], record["kl"], strict=True)
        }
        self._asked: set[tuple[str, int]] = set()

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> NDArray[np.float64]:
        """(choices, pieces) mean KL; each policy on each piece is measured once."""
        keys = [self._key(choice) for choice in choices]
        missing = [[piece for piece in pieces if (key, piece) not in self._known] for key in keys]
        if base is not None and any(missing):
            # measured first: its states are what the others start from
            self._measure(self._key(base), base, sorted(set().union(*missing)), base)
        for key, choice, absent in zip(keys, choices, missing, strict=True):
            self._measure(key, choice, absent, base)
        counted = keys if base is None else [*keys, self._key(base)]
        fresh = {(key, piece) for key in counted for piece in pieces} - self._asked
        self._asked |= fresh
        self.spent += len(fresh) * self.piece_tokens
        self._done(self.spent)
        return np.array([[self._known[key, piece] for piece in pieces] for key in keys])

    def _measure(self, key: str, choice: Choice, pieces: list[int], base: Choice | None) -> None:
        pieces = [piece for piece in pieces if (key, piece) not in self._known]
        if not pieces:
            return
        kl = self.replay.kl([choice], pieces, base)[0]
        kl = np.nan_to_num(kl, nan=_WORST_KL, posinf=_WORST_KL).tolist()
        self._journal.append(
            {
                "corpus": self._corpus,
                "piece_tokens": self.piece_tokens,
                "policy": key,
                "pieces": pieces,
                "kl": kl,
            }
        )
        self._known |= {(key, piece): value for piece, value in zip(pieces, kl, strict=True)}

    def _key(self, choice: Choice) -> str:
        names = "\n".join(self._names[candidate] for candidate in choice)
        return hashlib.sha256(names.encode()).hexdigest()[:24]


@contextmanager
def calibration_loss(
    session: Session, done: Callable[[int], None] = lambda spent: None
) -> Iterator[CalibrationLoss]:
    """The loss of a session; while it is open the model's weights belong to it.

    Args:
        session: the run.
        done: called with the tokens spent, after each measurement.
    """
    from bitsearch.objectives.replay import replaying

    space = session.space
    tokens = session.corpora["calibration"].tokens
    with replaying(
        session.decoder, session.weights, space.units, space.candidates, tokens
    ) as replay:
        yield CalibrationLoss(session, replay, done)


def solve_measured(
    session: Session,
    problem: Problem,
    solver: tuple[str, MeasuredSolver],
    tokens: int | None,
    storage: str | None,
    progress: Progress,
) -> Solution:
    """Let a measured solver search on the run's calibration text.

    Args:
        session: the run.
        problem: of the session's space.
        solver: its name, and itself.
        tokens: that it may spend; None: `PASSES` times the text.
        storage: URL of the database of its study; None: `study.db` in the run.
        progress: called with a stage, tokens done and tokens in all.
    """
    name, solve = solver
    corpus = session.corpora["calibration"].tokens
    limit = PASSES * corpus.numel() if tokens is None else tokens

    def done(spent: int) -> None:
        progress(f"{name} (calibration tokens)", min(spent, limit), limit)

    with calibration_loss(session, done) as loss:
        found = solve(
            problem,
            cast(Loss, loss),
            tokens=limit,
            seed=session.settings.seed,
            traits=traits(session.space),
            study=study_place(session, problem, name, storage),
        )
    done(limit)
    return found


def traits(space: Space) -> Traits:
    """Kinds by place in the block, depths by block; the embedding is first, the head last."""
    places = [(unit.kind, *(matrix.role for matrix in unit.matrices)) for unit in space.units]
    numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
    last = max(1, len(space.layout.blocks) - 1)
    outside = {"embedding": 0.0, "head": 1.0}
    return Traits(
        np.array([numbers[place] for place in places], np.int64),
        np.array([u.block / last if u.block is not None else outside[u.kind] for u in space.units]),
    )


def study_place(session: Session, problem: Problem, solver: str, storage: str | None) -> StudyPlace:
    """Where the study of a solver on a problem is kept.

    Its name changes with whatever changes the policies or their losses. In a
    run's own database one process works at a time; in a shared one a worker is
    known by its machine and its run directory.
    """
    path = session.run.path.resolve()
    settings = {
        **session.table_signature(solver),
        "units": [unit.name for unit in session.space.units],
        "candidates": [candidate.name for candidate in session.space.candidates],
        "ties": [list(tie) for tie in problem.ties],
        "distinct": problem.distinct,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in (problem.damage, problem.costs, problem.budgets):
        digest.update(np.ascontiguousarray(array, np.float64).tobytes())
    name = f"{solver}-{digest.hexdigest()[:16]}"
    if storage is None:
        return StudyPlace(f"sqlite:///{path / 'study.db'}", name, "run")
    return StudyPlace(storage, name, f"{socket.gethostname()}:{path}")
