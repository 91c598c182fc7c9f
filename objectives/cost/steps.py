"""Whole steps of a model: the policies that are timed, and their times."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitsearch.formats import Format
from bitsearch.kernels.devices import Device
from bitsearch.kernels.regime import Regime
from bitsearch.objectives.cost.assemble import assemble
from bitsearch.objectives.cost.rest import runnable
from bitsearch.units import ModelLayout, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bitsearch.objectives.cost.assemble import Weights

Choice = list[tuple[Unit, Format]]

RANDOM_CONFIGURATIONS = 24
_SAMPLES, _WARM = 9, 2


def configurations(
    device: Device, layout: ModelLayout, formats: Sequence[Format], regime: Regime, seed: int
) -> dict[str, Choice]:
    """Every uniform policy, and random ones, of the formats that run.

    `uniform-F` is F wherever it has a kernel; elsewhere the next wider format that has
    one, or else the widest. `random-N` first draws up to four formats, then one of
    these for each unit, so that policies differ in time and not only in order.
    """
    runs = runnable(device, layout, formats, regime)
    found: dict[str, Choice] = {}
    for format in formats:
        if any(format in each for each in runs.values()):
            choice = [(unit, _nearest(unit, format, runs[unit.name])) for unit in layout.units]
            found[f"uniform-{format.name}"] = choice
    generator = random.Random(seed)
    for index in range(RANDOM_CONFIGURATIONS):
        drawn = generator.sample(list(formats), generator.randint(1, min(4, len(formats))))
        found[f"random-{index}"] = [
            (unit, generator.choice([f for f in runs[unit.name] if f in drawn] or runs[unit.name]))
            for unit in layout.units
        ]
    return found


def measured_step(
    device: Device,
    layout: ModelLayout,
    config: PreTrainedConfig,
    choice: Choice,
    regime: Regime,
    weights: Weights | None = None,
) -> tuple[float, float]:
    """Median nanoseconds of a whole step: on the device's clock, and on the wall's."""
    model = assemble(device, layout, config, choice, regime, weights)
    try:
        for _ in range(_WARM):
            model.step.sample()
        seen = [model.step.sample() for _ in range(_SAMPLES)]
    finally:
        model.close()
    clock, wall = (statistics.median(times) for times in zip(*seen, strict=True))
    return clock, wall


def _nearest(unit: Unit, format: Format, runs: Sequence[Format]) -> Format:
    """The format itself, the next wider one that runs, or the widest."""
    if format in runs:
        return format
    size = format.bytes(1, 4096)
    wider = [other for other in runs if other.bytes(1, 4096) >= size]
    return wider[0] if wider else runs[-1]
