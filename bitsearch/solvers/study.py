"""Optuna studies that a killed process resumes to the same result.

Optuna does not store the random state of a sampler. Here every trial gets a
fresh sampler, seeded by the study's seed and the trial's number, so that what it
proposes depends on nothing but the trials before it. The truth is in the
database; a trial that was under way when its worker was killed is proposed
again, to the same policy, by the next worker of that name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from bitsearch.errors import BadInput, UsageError
from bitsearch.solvers.measured import Loss, StudyPlace, everywhere
from bitsearch.solvers.problem import Choice

Propose = Callable[[Trial], Choice]
_CHOICE, _WORKER, _KL = "choice", "worker", "kl"
OPENINGS = 20
# Workers that open a new database together get in each other's way: one makes its
# tables, the others find them there already, or half made (a RuntimeError).
_COLLISIONS = ("already exists", "duplicate key", "UNIQUE constraint")

optuna.logging.set_verbosity(optuna.logging.ERROR)


class SeededByTrial(BaseSampler):
    """A new sampler for each trial, seeded by (seed, trial number).

    Args:
        make: the sampler of a seed.
        seed: of the whole study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        self._inner = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        sequence = np.random.SeedSequence([self._seed, trial.number])
        self._inner = self._make(int(sequence.generate_state(1)[0]))
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


def minimise(
    propose: Propose,
    loss: Loss,
    *,
    sampler: Callable[[int], BaseSampler],
    seed: int,
    tokens: int,
    place: StudyPlace | None,
    values: Callable[[Choice, float], Sequence[float]],
    objectives: int = 1,
    first: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[Choice, float]]:
    """Propose and measure policies until the tokens are spent.

    A policy that was proposed before is not measured again. Workers that share
    a study add to one history, and each ends when all together have spent the
    tokens.

    Args:
        propose: a feasible policy from a trial's parameters.
        loss: measures it, on all pieces.
        sampler: Optuna's sampler for a seed.
        seed: of the study.
        tokens: spent by the whole study at most, but for the last policies.
        place: where the study is kept; None: in memory.
        values: what to minimise, of a policy and its mean KL.
        objectives: number of these values.
        first: parameters of the first trials.

    Returns:
        Distinct policies with their mean KL, in order of trials.
    """
    with _opened(place) as storage:
        study = optuna.create_study(
            storage=storage,
            study_name=None if place is None else place.name,
            load_if_exists=True,
            sampler=SeededByTrial(sampler, seed),
            directions=["minimize"] * objectives,
        )
        for parameters in first:
            study.enqueue_trial(dict(parameters), skip_if_exists=True)
        worker = "" if place is None else place.worker
        # before it begins any trial: see `_left_behind`
        study.set_user_attr(_name(worker), True)
        return _worked(study, worker, propose, loss, tokens, values)


def _worked(
    study: Study,
    worker: str,
    propose: Propose,
    loss: Loss,
    tokens: int,
    values: Callable[[Choice, float], Sequence[float]],
) -> list[tuple[Choice, float]]:
    """Add trials to a study until its tokens are spent: see `minimise`."""
    once = loss.pieces * loss.piece_tokens
    while True:
        trials = study.get_trials(deepcopy=False)
        finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        known = {tuple(t.user_attrs[_CHOICE]): float(t.user_attrs[_KL]) for t in finished}
        # small problems have fewer policies than the tokens could pay for
        if known and (len(known) * once >= tokens or len(finished) * once >= 2 * tokens):
            return [(np.array(choice, np.int64), kl) for choice, kl in known.items()]
        trial = _left_behind(study, trials, worker) or study.ask()
        trial.set_user_attr(_WORKER, worker)
        choice = propose(trial)
        key = tuple(choice.tolist())
        kl = known[key] if key in known else everywhere(loss, choice)
        trial.set_user_attr(_CHOICE, list(key))
        trial.set_user_attr(_KL, kl)
        study.tell(trial, [float(value) for value in values(choice, kl)])


def _left_behind(study: Study, trials: Sequence[FrozenTrial], worker: str) -> Trial | None:
    """A trial that this worker began and did not finish."""
    # Killed before it could sign, a worker that was always alone still knows its own.
    alone = {key for key in study.user_attrs if key.startswith(_name(""))} == {_name(worker)}
    for trial in trials:
        signed = trial.user_attrs.get(_WORKER, worker if alone else None)
        if trial.state == TrialState.RUNNING and signed == worker:
            return Trial(study, trial._trial_id)
    return None


def _name(worker: str) -> str:
    """The study's attribute that tells of a worker."""
    return f"{_WORKER} {worker}"


@contextmanager
def _opened(place: StudyPlace | None) -> Iterator[optuna.storages.RDBStorage | None]:
    """The database of a study; None, in memory, without a place."""
    if place is None:
        yield None
        return
    storage = _open(place)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _open(place: StudyPlace) -> optuna.storages.RDBStorage:
    """The database of a study.

    Raises:
        UsageError: its driver is not installed, or it is no URL of a database.
        BadInput: it cannot be opened.
    """
    parts = urlsplit(place.storage)
    if not parts.scheme:
        raise UsageError(
            f"storage '{place.storage}' is no URL of a database; write "
            "sqlite:////folder/study.db or postgresql://user@host/name"
        )
    # never print a password
    shown = f"{parts.scheme}://{(parts.netloc or '').rpartition('@')[2]}{parts.path}"
    waiting = {"connect_args": {"timeout": 120}} if parts.scheme == "sqlite" else None
    for attempt in range(OPENINGS):
        try:
            return optuna.storages.RDBStorage(place.storage, engine_kwargs=waiting)
        except ImportError as error:
            raise UsageError(
                f"storage {shown} needs a driver: {error}; "
                "for PostgreSQL install bitsearch[postgres]"
            ) from error
        except Exception as error:  # drivers raise what they like
            collided = isinstance(error, RuntimeError) or any(
                words in str(error) for words in _COLLISIONS
            )
            if not collided or attempt == OPENINGS - 1:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise BadInput(f"study storage {shown} cannot be opened: {reason[0]}") from error
            time.sleep(0.5)
    raise AssertionError
