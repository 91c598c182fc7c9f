"""Milliseconds of a model in a regime, from the latency table of a machine.

    T(choice) = rest(regime) + Σ_unit launch(unit, choice[unit])

The sum over launches is additive, as in HAWQ-V3 (Yao et al., ICML 2021, section 3.4)
and Q-Palette (Lee and Song, NeurIPS 2025, section 4); `rest` is what a step takes
beyond its launches: attention over the stated context, norms, the embedding's lookup.
Launches count as they are inside a step where the table tells (`in_step`), else as alone.
Times are integers in nanoseconds, so that solvers add them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format
from bitsearch.kernels.devices import Launch, NoKernel
from bitsearch.kernels.profile_file import Cell, Profile
from bitsearch.kernels.regime import Regime, is_launched, launch_of
from bitsearch.units import ModelLayout, Unit


@dataclass(frozen=True, slots=True)
class Latency:
    """What units × candidates take in one regime.

    Attributes:
        regime: of the step.
        nanoseconds: (units, candidates); 0 where there is no kernel.
        runs: (units, candidates) bool, whether a kernel executes the candidate.
        rest: nanoseconds of a step beyond its launches.
        why: of the first candidate of each unit that no kernel executes.
        notes: what is interpolated, estimated or unstable, one line each.
    """

    regime: Regime
    nanoseconds: NDArray[np.int64]
    runs: NDArray[np.bool_]
    rest: int
    why: tuple[str, ...]
    notes: tuple[str, ...]

    def total(self, choice: NDArray[np.int64]) -> int:
        """Predicted nanoseconds of a step under a choice of shape (units,)."""
        return self.rest + int(self.nanoseconds[np.arange(len(choice)), choice].sum())


def latency(
    profile: Profile,
    path: Path,
    layout: ModelLayout,
    candidates: Sequence[Format],
    allowed: NDArray[np.bool_],
    regime: Regime,
) -> Latency:
    """Look up the times of every allowed unit and candidate.

    Args:
        profile: the table.
        path: of its file, for messages.
        layout: of the model.
        candidates: formats, in column order.
        allowed: (units, candidates); others are not looked up.
        regime: of the step.

    Raises:
        BadInput: the table holds no times for this regime, or for a shape or format.
        UsageError: a unit has no candidate that the device runs.
    """
    table = _Table(profile, path)
    rest, notes = table.rest(regime)
    tied = bool(layout.tied)
    nanoseconds = np.zeros(allowed.shape, np.int64)
    runs = np.zeros(allowed.shape, bool)
    why: list[str] = []
    for row, unit in enumerate(layout.units):
        refused = ""
        for column in np.flatnonzero(allowed[row]).tolist():
            try:
                time = table.launch(launch_of(unit, candidates[column].name, regime))
                nanoseconds[row, column] = round(1e3 * time) if is_launched(unit, tied) else 0
                runs[row, column] = True
            except NoKernel as error:
                refused = refused or str(error)
        why.append(refused)
        if not runs[row].any():
            raise UsageError(_nothing_runs(profile, unit, refused))
    found = [*notes, *table.notes]
    if profile.header.estimated:
        found.insert(0, "estimated from a few device numbers, not measured")
    return Latency(regime, nanoseconds, runs, round(1e3 * rest), tuple(why), tuple(found))


class _Table:
    """Cells by what they tell."""

    def __init__(self, profile: Profile, path: Path) -> None:
        self._profile, self._path = profile, path
        self._launches = {cell.launch: cell for cell in profile.cells if cell.op == "linear"}
        self.notes: dict[str, None] = {}

    def launch(self, launch: Launch) -> float:
        """Microseconds of a launch; between two of other row counts if it was not timed.

        Raises:
            NoKernel: the device has none.
            BadInput: nothing can be told from the table.
        """
        cell = self._launches.get(launch)
        if cell is not None:
            if cell.status == "unsupported":
                raise NoKernel(cell.why or f"{self._profile.header.device} has no kernel for it")
            if cell.status == "unstable":
                self.notes[f"unstable times of {_name(launch)}"] = None
            return cell.adds_us
        (_, format), *_ = launch.segments
        near = sorted(
            (other.n, cell.adds_us)
            for other, cell in self._launches.items()
            if (other.m, other.k, other.segments[0][1]) == (launch.m, launch.k, format)
            and len(other.segments) == 1
            and cell.status != "unsupported"
        )
        if len(near) < 2 or not near[0][0] <= launch.n <= near[-1][0]:
            raise BadInput(
                f"profile {self._path} holds no time of {_name(launch)}; make one with "
                f"`bitsearch profile --shapes MODEL --batch {launch.m} --candidates {format}`"
            )
        self.notes[f"{_name(launch)} lies between timed row counts"] = None
        rows, times = (list(column) for column in zip(*near, strict=True))
        return float(np.interp(launch.n, rows, times))

    def rest(self, regime: Regime) -> tuple[float, list[str]]:
        """Microseconds of a step beyond its launches, and a note if no such step was timed."""
        timed = {
            cell.context or 0: cell
            for cell in self._profile.cells
            if cell.op == "rest" and cell.phase == regime.phase and _fits(cell, regime)
        }
        if regime.context in timed:
            return timed[regime.context].adds_us, []
        contexts = sorted(timed)
        if regime.phase == "prefill" or len(contexts) < 2:
            raise BadInput(
                f"profile {self._path} holds no step of {regime.text}, but of "
                f"{', '.join(_regimes(self._profile)) or 'none'}; name one of these, or profile it"
            )
        # Attention reads the cache once: its time is a line in the context.
        low = max([c for c in contexts[:-1] if c <= regime.context], default=contexts[0])
        high = contexts[contexts.index(low) + 1]
        slope = (timed[high].adds_us - timed[low].adds_us) / (high - low)
        inside = contexts[0] <= regime.context <= contexts[-1]
        note = f"rest of a step {'between' if inside else 'beyond'} timed contexts"
        return max(0.0, timed[low].adds_us + slope * (regime.context - low)), [note]


def _fits(cell: Cell, regime: Regime) -> bool:
    return regime.phase == "prefill" or cell.m == regime.batch


def _regimes(profile: Profile) -> list[str]:
    return [regime_of(cell).text for cell in profile.cells if cell.op == "rest"]


def regime_of(cell: Cell) -> Regime:
    """The regime of a `rest` cell."""
    context = cell.context or 1
    if cell.phase == "prefill":
        return Regime("prefill", 1, context)
    return Regime("decode", cell.m, context)


def _name(launch: Launch) -> str:
    formats = "+".join(format for _, format in launch.segments)
    return f"{formats} at {launch.n} × {launch.k}, {launch.m} rows"


def _nothing_runs(profile: Profile, unit: Unit, refused: str) -> str:
    shape = f"{sum(m.out_features for m in unit.matrices)} × {unit.matrices[0].in_features}"
    return (
        f"no candidate of {unit.name} ({shape}) has a kernel on {profile.header.device} "
        f"({refused}); add one to --candidates, such as bf16"
    )
