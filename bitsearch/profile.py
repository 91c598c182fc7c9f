"""The latency table of this machine for a model's shapes, and its check from end to end."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from bitsearch.errors import UsageError
from bitsearch.formats import Format, parse_format, parse_formats
from bitsearch.kernels import processor
from bitsearch.kernels.devices import Device, open_device
from bitsearch.kernels.profile_file import (
    Cell,
    Check,
    Checked,
    Header,
    Profile,
    Protocol,
    check_machine,
    load_profile,
    profile_text,
)
from bitsearch.kernels.profiler import time_launches
from bitsearch.kernels.regime import Regime, launch_of
from bitsearch.models.load import open_layout
from bitsearch.objectives.cost.analytic import NUMBERS, estimated_cells
from bitsearch.objectives.cost.assemble import check_context, longest_context
from bitsearch.objectives.cost.in_step import in_steps
from bitsearch.objectives.cost.latency import latency, regime_of
from bitsearch.objectives.cost.rest import rest_cell, runnable
from bitsearch.objectives.cost.steps import configurations, measured_step
from bitsearch.run import atomic_write
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (stage, done, total)

CONTEXTS = (256, 1024)


def make_profile(
    model: str,
    out: Path,
    regimes: Sequence[Regime],
    *,
    device: str,
    threads: int,
    candidates: str | None,
    revision: str | None,
    rounds: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Time every launch of a model in every regime, and the rest of its steps; write the table.

    Args:
        model: whose shapes are timed; its weights are not read.
        out: the file.
        regimes: to time, one at least.
        device: registered name, or `auto`.
        threads: of the processor.
        candidates: formats to time; None takes the device's own.
        revision: hub revision.
        rounds: passes over all launches.
        seed: of weights, inputs and orders.
        progress: called with stage, done, total.

    Returns:
        What `profile --json` prints.

    Raises:
        BadInput: the device is not here, the machine is too busy, or the model cannot
            run in a regime.
    """
    started = time.monotonic()
    layout, config, _ = open_layout(model, revision=revision)
    opened = open_device(device, threads)
    formats = parse_formats(candidates or ",".join(opened.formats()))
    for regime in regimes:
        check_context(layout, config, regime)
        runnable(opened, layout, formats, regime)  # says what is missing before anything is timed
    busy = processor.load()
    # Weights that no cache holds; but those of a small model stay in it, as they would in use.
    rotation = min(2 * opened.cache_bytes() + 1, 2 * layout.parameters)
    calibration = opened.calibrate()
    launches = dict.fromkeys(
        launch_of(unit, format.name, regime)
        for regime in regimes
        for unit in layout.units
        for format in formats
    )
    cells, sentinel = time_launches(
        opened,
        list(launches),
        rotation=rotation,
        rounds=rounds,
        seed=seed,
        fixed_us=calibration["launch_us"],
        progress=lambda done, total: progress("launches", done, total),
    )
    for done, regime in enumerate(regimes):
        progress("rests", done, len(regimes))
        cells.append(rest_cell(opened, layout, config, formats, regime))
    progress("rests", len(regimes), len(regimes))
    cells, in_step = in_steps(
        opened,
        layout,
        config,
        formats,
        regimes,
        cells,
        seed=seed,
        progress=lambda done, total: progress("steps", done, total),
    )
    header = Header(
        tool=f"bitsearch {version('bitsearch')}",
        date=time.strftime("%Y-%m-%d"),
        device=opened.name,
        machine=opened.machine(),
        kernels=opened.source(),
        facts=opened.facts(),
        calibration=calibration,
        protocol=Protocol(
            clock=opened.clock,
            threads=opened.threads(),
            rotation_bytes=rotation,
            rounds=rounds,
            seed=seed,
        ),
        sentinel=sentinel,
        in_step=in_step,
        model=model,
        model_type=layout.model_type,
        load=(busy, processor.load()),
        seconds=time.monotonic() - started,
        cells=len(cells),
    )
    atomic_write(out, profile_text(header, cells).encode())
    return describe(Profile(header=header, cells=cells), out)


def estimate_profile(
    model: str,
    out: Path,
    regimes: Sequence[Regime],
    numbers: str,
    *,
    candidates: str | None,
    revision: str | None,
) -> dict[str, Any]:
    """Write a table of a device that is not here, from a few of its numbers.

    Args:
        model: whose shapes it is for.
        out: the file.
        regimes: of the steps.
        numbers: such as `launch_us=2,read_gbps=3000,gflops=800000`, or the path of a
            measured profile, whose calibration is taken.
        candidates: formats that the device is taken to run.
        revision: hub revision.

    Raises:
        UsageError: the numbers cannot be read, or no candidates are named.
        BadInput: the path is no profile.
    """
    if not candidates:
        raise UsageError("--estimate needs --candidates: what a device runs is not a number")
    device, found = "estimated", {}
    if "=" not in numbers:
        header = load_profile(Path(numbers)).header
        device, found = f"{header.device} (estimated)", header.calibration
    else:
        found = _numbers_of(numbers)
    layout, config, _ = open_layout(model, revision=revision)
    for regime in regimes:
        check_context(layout, config, regime)
    cells = estimated_cells(found, layout, config, parse_formats(candidates), regimes)
    header = Header(
        tool=f"bitsearch {version('bitsearch')}",
        date=time.strftime("%Y-%m-%d"),
        device=device,
        machine={"name": numbers},
        kernels="roofline",
        facts={"energy": "no energy"},
        calibration=found,
        protocol=Protocol(clock="none", rotation_bytes=1, rounds=1, seed=0),
        sentinel=None,
        in_step=None,
        model=model,
        model_type=layout.model_type,
        load=(0.0, 0.0),
        seconds=0.0,
        cells=len(cells),
        estimated=True,
    )
    atomic_write(out, profile_text(header, cells).encode())
    return describe(Profile(header=header, cells=cells), out)


def _numbers_of(text: str) -> dict[str, float]:
    """`launch_us=2,read_gbps=3000,gflops=800000` by name."""
    try:
        found = {k.strip(): float(v) for k, _, v in (p.partition("=") for p in text.split(","))}
    except ValueError:
        found = {}
    if set(found) != set(NUMBERS) or not all(0 < value < 1e12 for value in found.values()):
        raise UsageError(f"--estimate {text}: write launch_us=2,read_gbps=3000,gflops=800000")
    return found


def default_contexts(model: str, revision: str | None) -> list[int]:
    """Two contexts, for a line between them, as far as the model takes so many tokens."""
    limit = longest_context(open_layout(model, revision=revision)[1])
    return [c for c in CONTEXTS if limit is None or c <= limit] or [limit or CONTEXTS[0]]


def check_profile(
    path: Path, model: str | None, *, revision: str | None, seed: int, progress: Progress
) -> dict[str, Any]:
    """Predict and measure whole models in uniform and random formats; keep it in the file.

    Args:
        path: of the profile.
        model: to assemble; None takes the profile's own.
        revision: hub revision.
        seed: of the random configurations.
        progress: called with stage, done, total.

    Returns:
        What `profile --check --json` prints.

    Raises:
        BadInput: the profile is damaged or of another machine.
    """
    profile = load_profile(path)
    header = profile.header
    if header.estimated:
        raise UsageError(f"profile {path} is estimated: there is no such device here to check it")
    device = open_device(header.device, header.protocol.threads or 1)
    check_machine(profile, device, path)
    layout, config, _ = open_layout(model or header.model, revision=revision)
    checks = [
        _checked(profile, path, device, layout, config, regime_of(cell), seed, progress)
        for cell in profile.cells
        if cell.op == "rest"
    ]
    # The cells stay as they were timed; only the header tells of the check.
    header = header.model_copy(update={"checks": checks})
    atomic_write(path, profile_text(header, profile.cells).encode())
    return describe(Profile(header=header, cells=profile.cells), path)


def describe(profile: Profile, path: Path) -> dict[str, Any]:
    """A profile as JSON values, for printing."""
    header = profile.header.model_dump(mode="json", by_alias=True)
    cells = [cell.model_dump(mode="json") for cell in profile.cells]
    return {"profile": str(path), "use": profile.header.use, **header, "table": cells}


def _checked(
    profile: Profile,
    path: Path,
    device: Device,
    layout: ModelLayout,
    config: PreTrainedConfig,
    regime: Regime,
    seed: int,
    progress: Progress,
) -> Check:
    formats = _timed_formats(profile.cells)
    table = latency(
        profile, path, layout, formats, np.ones((len(layout.units), len(formats)), bool), regime
    )
    choices = configurations(device, layout, formats, regime, seed)
    rows = []
    for done, (name, choice) in enumerate(choices.items()):
        progress(f"check {regime.text}", done, len(choices))
        columns = np.array([formats.index(format) for _, format in choice])
        measured, wall = measured_step(device, layout, config, choice, regime)
        rows.append(
            Checked(
                name=name,
                predicted_us=table.total(columns) / 1e3,
                measured_us=measured / 1e3,
                wall_us=wall / 1e3,
            )
        )
    progress(f"check {regime.text}", len(choices), len(choices))
    errors = [abs(row.predicted_us - row.measured_us) / row.measured_us for row in rows]
    rank = spearmanr([row.predicted_us for row in rows], [row.measured_us for row in rows])
    mean, worst, least = device.stability.error
    spearman = float(rank.statistic)
    return Check(
        regime=regime.text,
        configurations=rows,
        mean_error=statistics.mean(errors),
        worst_error=max(errors),
        spearman=spearman,
        times=statistics.mean(errors) <= mean and max(errors) <= worst,
        ranks=spearman >= least,
    )


def _timed_formats(cells: Sequence[Cell]) -> list[Format]:
    """Formats of the launches that have a kernel."""
    names = dict.fromkeys(
        name
        for cell in cells
        if cell.op == "linear" and cell.status != "unsupported"
        for _, name in cell.segments
    )
    return [parse_format(name) for name in names]
