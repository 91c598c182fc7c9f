"""Time budgets of a search: what its device runs, how long steps take, and what keeps a promise.

Times are predicted from a latency table, and the policies that may be shipped are
measured from end to end. What was measured is kept in the run, so that a resumed search
decides as it did before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.budget import Budget, is_time
from bitsearch.contenders import Contender
from bitsearch.errors import BadInput, InfeasibleBudget, UsageError
from bitsearch.kernels.devices import Device, open_device
from bitsearch.kernels.profile_file import check_machine, load_profile
from bitsearch.kernels.regime import Regime
from bitsearch.models.load import open_layout
from bitsearch.objectives.cost.assemble import Weights
from bitsearch.objectives.cost.latency import Latency, latency
from bitsearch.objectives.cost.steps import measured_step
from bitsearch.policy import PolicyLatency
from bitsearch.profile import make_profile
from bitsearch.run import file_sha256
from bitsearch.session import Progress, Session
from bitsearch.solvers.problem import Choice, Problem
from bitsearch.space import Space
from bitsearch.units import Unit

if TYPE_CHECKING:
    from bitsearch.formats import Format

log = logging.getLogger(__name__)

OWN_PROFILE = "profile.jsonl"
_JOURNAL = "times.journal"
_REPAIRS = 4
_MARGIN = 0.002  # tightened by so much more than the promise was missed by


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step took: nanoseconds on the device's clock, and on the wall's."""

    clock: float
    wall: float


class Timing:
    """The times of one search.

    Attributes:
        times: predicted ones, of each regime that a budget names.
        profile: the table that they come from.
        path: of its file.
        estimated: whether the table is of another machine, and nothing can be measured.
    """

    def __init__(
        self, session: Session, space: Space, budgets: Sequence[Budget], path: Path, estimated: bool
    ) -> None:
        self._session, self._budgets = session, budgets
        self.path, self.profile = path, load_profile(path)
        self.estimated = estimated
        if not estimated:
            if self.profile.header.estimated:
                raise BadInput(f"profile {path} is estimated; add --estimated to plan with it")
            check_machine(self.profile, self.device, path)
        regimes = dict.fromkeys(b.regime for b in budgets if b.regime is not None)
        self.times: dict[Regime, Latency] = {
            regime: latency(
                self.profile, path, space.layout, space.candidates, space.allowed, regime
            )
            for regime in regimes
        }
        for note in dict.fromkeys(note for time in self.times.values() for note in time.notes):
            log.warning("%s: %s", path, note)
        if not estimated and self.profile.header.use != "time":
            log.warning("%s: %s; the policy's time is measured", path, self.profile.header.use)

    @cached_property
    def device(self) -> Device:
        """The device that the table is of."""
        header = self.profile.header
        return open_device(header.device, header.protocol.threads or 1)

    def narrowed(self, space: Space) -> Space:
        """The space without the candidates that no kernel executes.

        Raises:
            UsageError: a unit has none left.
        """
        runs = np.logical_and.reduce([time.runs for time in self.times.values()])
        allowed = space.allowed & runs
        idle = ~allowed.any(axis=1)
        if idle.any():
            unit = int(np.flatnonzero(idle)[0])
            why = next(iter(self.times.values())).why[unit]
            raise UsageError(f"nothing that {space.units[unit].name} may take has a kernel ({why})")
        lost = [f.name for f, c in zip(space.candidates, (~allowed).all(axis=0), strict=True) if c]
        if lost:
            log.warning("left out, without a kernel on %s: %s", self._name, ", ".join(lost))
        return replace(space, allowed=allowed)

    def measured(self, choice: Choice, regime: Regime) -> Measured:
        """A whole step of a policy in a regime, on its real weights; measured once."""
        key = self._key(choice, regime)
        if key not in self._known:
            session = self._session
            clock, wall = measured_step(
                self.device,
                session.space.layout,
                self._config,
                session.space.assignment(choice),
                regime,
                Weights(self._parts, session.weights.model),
            )
            self._journal.append({"step": key, "clock": clock, "wall": wall})
            self._known[key] = Measured(clock, wall)
        return self._known[key]

    def keeps(self, choice: Choice) -> bool:
        """Whether a policy keeps every time budget: measured, or predicted where it cannot be."""
        for budget in self._budgets:
            if budget.regime is None:
                continue
            taken = (
                float(self.times[budget.regime].total(choice))
                if self.estimated
                else self.measured(choice, budget.regime).clock
            )
            if taken > budget.limit:
                return False
        return True

    def kept(self, contenders: Sequence[Contender], progress: Progress) -> list[Contender]:
        """Those that keep every time budget."""
        found = []
        for done, contender in enumerate(contenders):
            progress("steps", done, len(contenders))
            if self.keeps(contender.choice):
                found.append(contender)
        progress("steps", len(contenders), len(contenders))
        return found

    def untimed(self, problem: Problem) -> Problem:
        """The problem without its budgets of time."""
        limits = [
            limit if budget.regime is None else 2**62
            for limit, budget in zip(problem.budgets, self._budgets, strict=True)
        ]
        return replace(problem, budgets=np.array(limits, np.int64))

    def repaired(
        self, problem: Problem, choice: Choice, again: Callable[[Problem], list[Contender]]
    ) -> list[Contender]:
        """Policies of tightened limits, where the solver's answer took longer than predicted.

        Each limit that was missed is lowered by as much, and a little more, until the
        answer keeps what was asked for.

        Args:
            problem: of the search; its budgets in the order of the search's.
            choice: the solver's answer.
            again: the answer to a tighter problem and its neighbours, the answer first.
        """
        found: list[Contender] = []
        for attempt in range(1, _REPAIRS + 1):
            if self.estimated or self.keeps(choice):
                break
            problem = replace(problem, budgets=self._tightened(problem, choice))
            try:
                answers = again(problem)
            except InfeasibleBudget:
                break  # nothing is that fast; what else was found may still keep it
            found += [replace(c, name=f"{c.name}-repaired-{attempt}") for c in answers]
            choice = answers[0].choice
        return found

    def _tightened(self, problem: Problem, choice: Choice) -> NDArray[Any]:
        budgets = np.array(problem.budgets)
        for index, budget in enumerate(self._budgets):
            if budget.regime is None:
                continue
            time = self.times[budget.regime]
            missed = self.measured(choice, budget.regime).clock / budget.limit
            if missed > 1:
                predicted = min(time.total(choice), int(budgets[index]) + time.rest)
                budgets[index] = int(predicted / missed * (1 - _MARGIN)) - time.rest
        return budgets

    def describe(self, choice: Choice) -> list[PolicyLatency]:
        """What the policy file says of a policy's times, one entry a regime."""
        header = self.profile.header
        return [
            PolicyLatency(
                regime=regime.text,
                device=header.device,
                machine=header.machine,
                kernels=header.kernels,
                threads=header.protocol.threads,
                clock=header.protocol.clock,
                profile=file_sha256(self.path),
                predicted_ms=time.total(choice) / 1e6,
                measured_ms=None if self.estimated else self.measured(choice, regime).clock / 1e6,
                wall_ms=None if self.estimated else self.measured(choice, regime).wall / 1e6,
            )
            for regime, time in self.times.items()
        ]

    @property
    def _name(self) -> str:
        return self.profile.header.device

    @cached_property
    def _config(self) -> Any:
        settings = self._session.settings
        return open_layout(settings.model, revision=settings.revision, fuse=settings.fuse)[1]

    @cached_property
    def _journal(self) -> Any:
        return self._session.run.journal(_JOURNAL)

    @cached_property
    def _known(self) -> dict[str, Measured]:
        return {
            record["step"]: Measured(record["clock"], record["wall"])
            for record in self._journal.records
        }

    def _key(self, choice: Choice, regime: Regime) -> str:
        header = self.profile.header
        where = (header.device, *header.machine.values(), header.kernels, header.protocol.threads)
        names = [f"{u.name}={f.name}" for u, f in self._session.space.assignment(choice)]
        text = "\n".join([regime.text, *map(str, where), *names])
        return hashlib.sha256(text.encode()).hexdigest()

    def _parts(self, unit: Unit, format: Format) -> Any:
        weights = self._session.weights
        if format.exact:
            return [weights.reference(matrix) for matrix in unit.matrices]
        return [part for m in unit.matrices for part in weights.quantized(m, format)]


def open_timing(
    session: Session,
    space: Space,
    budgets: Sequence[Budget],
    path: Path | None,
    estimated: bool,
    progress: Progress,
) -> Timing | None:
    """The times that budgets ask for; None if all are bytes.

    Args:
        session: of the search.
        space: whose policies.
        budgets: of the search.
        path: a table; None takes the run's own, which is made if it is missing.
        estimated: whether a table of another machine will do.
        progress: called with stage, done, total.

    Raises:
        UsageError: a table is given without a time budget, or a unit has no kernel.
        BadInput: the table is damaged, of another machine, or lacks something.
    """
    regimes = list(dict.fromkeys(b.regime for b in budgets if b.regime is not None))
    if not regimes:
        if path is not None or estimated:
            raise UsageError("--latency and --estimated need a budget of time, such as 12ms")
        return None
    if path is None:
        if estimated:
            raise UsageError("--estimated needs a table: name one with --latency")
        path = session.run.path / OWN_PROFILE
        if not path.exists():
            _own_profile(session, space, regimes, path, progress)
    return Timing(session, space, budgets, path, estimated)


def _own_profile(
    session: Session, space: Space, regimes: list[Regime], path: Path, progress: Progress
) -> None:
    """Time the run's own candidates on this machine."""
    import psutil

    settings = session.settings
    make_profile(
        settings.model,
        path,
        regimes,
        device="auto",
        threads=psutil.cpu_count(logical=False) or 1,
        candidates=",".join(format.name for format in space.candidates),
        revision=settings.revision,
        rounds=3,
        seed=settings.seed,
        progress=progress,
    )


def default_candidates(budgets: Sequence[str], path: Path | None) -> str | None:
    """What units may take under a budget of time: all that the device runs; None under bytes.

    Args:
        budgets: as the user wrote them.
        path: of a table; None asks the device that a table would be made of.
    """
    if not any(is_time(text) for text in budgets):
        return None
    if path is None:
        return ",".join(open_device("auto", 1).formats())
    cells = load_profile(path).cells
    runs = (c for c in cells if c.op == "linear" and c.status != "unsupported")
    return ",".join(dict.fromkeys(name for cell in runs for _, name in cell.segments))
