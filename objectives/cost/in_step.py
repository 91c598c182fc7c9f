"""What launches add to a whole step, where other kernels run between them.

A launch that follows its like overlaps with it, and finds caches as it left them; between the
norms and the attention of a model it does neither. What lone times t miss of whole steps,

    step − (rest + Σ_launch t) = r + Σ_launch (a + b·t)

is fitted by least squares, relative to each step: r for each regime, a and b for each kernel and
number of rows. So few numbers are told apart by a few dozen steps, whatever the launches and
formats. They are used where they halve, at least, what lone times miss of steps that were left
out (each once), make it larger in no regime, and leave no launch or rest without time; where
steps vary by themselves, or each format has its own kernel, they do not.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitsearch.formats import Format
from bitsearch.kernels.devices import Device, Launch
from bitsearch.kernels.profile_file import Cell, InStep
from bitsearch.kernels.regime import Regime, is_launched, launch_of
from bitsearch.objectives.cost.latency import regime_of
from bitsearch.objectives.cost.steps import Choice, configurations, measured_step
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SEED = 1 << 31  # apart from the seeds of checks
_LEAST = 2e-3  # error of lone times that is worth a correction
_SMALLEST = 1e-6  # singular value, of the largest: below it nothing tells two numbers apart

Floats = NDArray[np.float64]


def in_steps(
    device: Device,
    layout: ModelLayout,
    config: PreTrainedConfig,
    formats: Sequence[Format],
    regimes: Sequence[Regime],
    cells: Sequence[Cell],
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[list[Cell], InStep]:
    """Cells with `step_us` where whole steps say more than lone launches; and how well.

    Args:
        device: what runs the models.
        layout: of the model.
        config: of the model.
        formats: to choose from.
        regimes: that the cells were timed for.
        cells: launches alone, and a rest for each regime.
        seed: of the policies and their order.
        progress: called with steps done and to do.
    """
    steps: list[tuple[Regime, Choice]] = []
    for alike in _alike(regimes):
        choices = configurations(device, layout, formats, alike[0], seed + _SEED).values()
        steps += [(alike[i % len(alike)], choice) for i, choice in enumerate(choices)]
    random.Random(seed).shuffle(steps)
    place = {_key(cell): at for at, cell in enumerate(cells)}
    counts, measured = np.zeros((len(steps), len(cells))), np.zeros(len(steps))
    for row, (regime, choice) in enumerate(steps):
        progress(row, len(steps))
        measured[row] = measured_step(device, layout, config, choice, regime)[0] / 1e3
        counts[row, place[regime]] = 1
        for launch, count in launches(layout, choice, regime).items():
            counts[row, place[launch]] += count
    progress(len(steps), len(steps))
    return corrected(cells, counts, measured)


def corrected(cells: Sequence[Cell], counts: Floats, measured: Floats) -> tuple[list[Cell], InStep]:
    """The fit of this module.

    Args:
        cells: launches alone, and rests.
        counts: (steps, cells), how often each step has each.
        measured: (steps,) microseconds.
    """
    alone = np.array([cell.median_us for cell in cells])
    missed = (measured - counts @ alone) / measured
    terms = _terms(cells, alone)
    per_step = counts @ terms / measured[:, None]
    size = np.linalg.norm(per_step, axis=0)
    terms, per_step = terms[:, size > 0], (per_step / np.maximum(size, 1e-300))[:, size > 0]
    left, values, right = np.linalg.svd(per_step, full_matrices=False)
    known = values > _SMALLEST * values[0]
    left, values, right = left[:, known], values[known], right[known]
    fitted = left.T @ missed
    # Leaving a step out leaves its residual over 1 − its leverage.
    out = (missed - left @ fitted) / np.maximum(1 - (left**2).sum(1), 1e-9)
    times = alone + terms @ (right.T @ (fitted / values) / size[size > 0])
    rests = [column for column, cell in enumerate(cells) if cell.op == "rest"]
    of_regimes = [counts[:, column] > 0 for column in rests]
    found = InStep(
        steps=len(measured),
        alone_error=_rms(missed),
        fitted_error=_rms(out),
        used=bool(
            _rms(out) < _rms(missed) / 2
            and _rms(missed) > _LEAST
            and all(_rms(out[own]) <= _rms(missed[own]) for own in of_regimes if own.any())
            and (times[np.any(terms, axis=1)] > 0).all()
        ),
    )
    if not found.used:
        return list(cells), found
    return [
        cell.model_copy(update={"step_us": float(time)}) if has else cell
        for cell, time, has in zip(cells, times, np.any(terms, axis=1).tolist(), strict=True)
    ], found


def launches(layout: ModelLayout, choice: Choice, regime: Regime) -> Counter[Launch]:
    """How often a step makes each launch."""
    tied = bool(layout.tied)
    return Counter(
        launch_of(unit, format.name, regime) for unit, format in choice if is_launched(unit, tied)
    )


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _terms(cells: Sequence[Cell], alone: Floats) -> Floats:
    """(cells, numbers): 1 for each rest and for launches of a kernel; and these times t."""
    kinds = [(cell.op, cell.kernel, cell.m, cell.context, cell.phase) for cell in cells]
    columns = []
    for kind in dict.fromkeys(kinds):
        own = np.array([other == kind for other in kinds], float)
        columns += [own] if kind[0] == "rest" else [own, own * alone]
    return np.array(columns).T


def _alike(regimes: Sequence[Regime]) -> list[list[Regime]]:
    """Regimes by their launches: those of decode differ in context alone."""
    found: dict[tuple[str, int], list[Regime]] = {}
    for regime in regimes:
        found.setdefault((regime.phase, regime.rows), []).append(regime)
    return list(found.values())


def _key(cell: Cell) -> Launch | Regime:
    return cell.launch if cell.op == "linear" else regime_of(cell)
