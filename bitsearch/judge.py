"""Measures policies on a corpus, once each, and remembers across runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitsearch.contenders import Contender
from bitsearch.evaluate import Quality
from bitsearch.session import Progress, Session
from bitsearch.solvers.problem import Choice

if TYPE_CHECKING:
    from bitsearch.objectives.teacher import Measured, Teacher


class Judge:
    """Qualities of policies on one of the session's corpora.

    Results go to `evaluations.journal`, under hashes of the corpus and of the
    policy, so that neither a resumed run nor a new budget measures one twice.
    """

    def __init__(self, session: Session, purpose: str) -> None:
        self._session = session
        self.corpus = session.corpora[purpose]
        self._journal = session.run.journal("evaluations.journal")
        self._known = {
            record["policy"]: record
            for record in self._journal.records
            if record["corpus"] == self.corpus.sha256
        }

    def quality(self, choice: Choice) -> Quality:
        """The quality of a policy given as (units,) candidate indices."""
        key = self._key(choice)
        if key not in self._known:
            teacher = self._teacher
            with self._session.weights.applied(self._session.space.assignment(choice)):
                self._record(key, teacher.measure())
        return self._read(key)

    def qualities(
        self, contenders: Sequence[Contender], stage: str, progress: Progress
    ) -> list[Quality]:
        """The quality of each contender, under a name that the progress shows."""
        found = []
        for index, contender in enumerate(contenders):
            progress(stage, index, len(contenders))
            found.append(self.quality(contender.choice))
        progress(stage, len(contenders), len(contenders))
        return found

    @property
    def reference_nll(self) -> NDArray[np.float64]:
        """(windows,) negative log likelihood of the unquantized model."""
        if "reference" not in self._known:
            self._record("reference", self._teacher.measure())
        return self._read("reference").nll

    def alone(self, choice: Choice, unit: int) -> float:
        """Mean KL with one unit in its candidate of the policy, all others untouched."""
        from bitsearch.objectives.damage.kl import restart_block

        space = self._session.space
        scored, format = space.units[unit], space.candidates[choice[unit]]
        key = f"alone:{scored.name}:{format.name}"
        if key not in self._known:
            teacher = self._restarting
            with self._session.weights.applied([(scored, format)]):
                start = restart_block(scored, len(self._session.decoder.blocks))
                self._record(key, teacher.measure(start, kl_only=True))
        return self._read(key).mean_kl

    @cached_property
    def _teacher(self) -> Teacher:
        from bitsearch.objectives.teacher import Teacher

        return Teacher(self._session.decoder, self.corpus.tokens, restart=False)

    @cached_property
    def _restarting(self) -> Teacher:
        from bitsearch.objectives.teacher import Teacher

        return Teacher(self._session.decoder, self.corpus.tokens, restart=True)

    def _key(self, choice: Choice) -> str:
        space = self._session.space
        names = "\n".join(f"{u.name}={f.name}" for u, f in space.assignment(choice))
        return hashlib.sha256(names.encode()).hexdigest()

    def _record(self, key: str, measured: Measured) -> None:
        record = {
            "corpus": self.corpus.sha256,
            "policy": key,
            "kl": measured.kl.double().tolist(),
            "nll": measured.nll.double().tolist(),
            "top1": measured.top1.double().tolist(),
        }
        for name in ("kl", "nll"):
            # A destroyed model overflows; the worst finite value keeps files valid JSON.
            record[name] = np.nan_to_num(record[name], nan=1e6, posinf=1e6).tolist()
        self._journal.append(record)
        self._known[key] = record

    def _read(self, key: str) -> Quality:
        record = self._known[key]
        return Quality(*(np.array(record[name]) for name in ("kl", "nll", "top1")))
