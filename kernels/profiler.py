"""Times launches of a device so that the times can be trusted, or says that they cannot.

All cells are timed in several rounds, each in a new random order, on weights that no
cache holds, so that what else the machine does falls on all of them alike. One cell,
the sentinel, comes back every so often; where it drifts, the run is not used.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.kernels.devices import Device, Launch, NoKernel, Timed
from bitsearch.kernels.profile_file import Cell, Sentinel

EVERY = 20  # cells from one sentinel to the next
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 64  # of a cell in a round
_LEAST_SECONDS = 0.02


@dataclass(slots=True)
class Samples:
    """What was seen of one launch."""

    launch: Launch
    times: list[float] = field(default_factory=list)
    kernel: str = ""
    activations: str = ""
    bytes: int = 0
    error: float = 0.0

    def add(self, timed: Timed) -> list[float]:
        """Warm up, take samples, keep them; the new ones."""
        self.kernel, self.activations = timed.kernel, timed.activations
        self.bytes, self.error = timed.bytes, max(self.error, timed.error)
        timed.sample()
        taken: list[float] = []
        started = time.perf_counter()
        while len(taken) < _LEAST_SAMPLES or (
            len(taken) < _MOST_SAMPLES and time.perf_counter() - started < _LEAST_SECONDS
        ):
            taken.append(timed.sample())
        self.times += taken
        return taken


def time_launches(
    device: Device,
    launches: Sequence[Launch],
    *,
    rotation: int,
    rounds: int,
    seed: int,
    fixed_us: float,
    progress: Callable[[int, int], None],
) -> tuple[list[Cell], Sentinel]:
    """Cells of launches in the order given; those without a kernel are `unsupported`.

    Args:
        device: what runs them.
        launches: what to time, each once.
        rotation: bytes of weights that a pass goes through before it sees one again.
        rounds: passes over all of them.
        seed: of weights, inputs and orders.
        fixed_us: time of the smallest launch.
        progress: called with launches done and to do.

    Raises:
        BadInput: the sentinel drifted, or no launch has a kernel.
    """
    refused: dict[Launch, str] = {}
    samples: dict[Launch, Samples] = {}
    for launch in launches:
        try:
            device.kernel(launch)
            samples[launch] = Samples(launch)
        except NoKernel as error:
            refused[launch] = str(error)
    if not samples:
        raise BadInput(f"device {device.name} has no kernel for any of these shapes and formats")
    # The same memory throughout: only the machine can make its times differ. The longest launch,
    # as those of few bytes differ by themselves.
    longest = max(samples, key=_weight_bytes)
    watched = device.timed(longest, rotation, seed)
    sentinel: list[float] = []
    generator = random.Random(seed)
    done = 0
    try:
        for _ in range(rounds):
            order = list(samples.values())
            generator.shuffle(order)
            for index, each in enumerate(order):
                if index % EVERY == 0:
                    sentinel.append(statistics.median(Samples(longest).add(watched)))
                _take(device, each, rotation, seed)
                done += 1
                progress(done, rounds * len(samples))
        sentinel.append(statistics.median(Samples(longest).add(watched)))
    finally:
        watched.close()
    # A burst at one sentinel is no drift: it reaches a few cells in one of their rounds.
    threes = zip(sentinel, sentinel[1:], sentinel[2:], strict=False)
    middles = [statistics.median(three) for three in threes] or sentinel
    drift = (max(middles) - min(middles)) / statistics.median(sentinel)
    if drift > device.stability.drift:
        raise BadInput(
            f"the machine is too busy to be profiled: one kernel's time drifted by "
            f"{100 * drift:.0f} % (at most {100 * device.stability.drift:.0f} %); "
            "end other programs and try again"
        )
    cells = [
        _cell(samples[launch], device.stability.spread, fixed_us)
        if launch in samples
        else _unsupported(launch, refused[launch])
        for launch in launches
    ]
    return cells, Sentinel(
        median_us=statistics.median(sentinel) / 1e3, drift=drift, times=len(sentinel)
    )


def quartiles(times: Sequence[float]) -> tuple[float, float, float, float]:
    """Least, first quartile, median and third quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return min(times), low, middle, high


def _weight_bytes(launch: Launch) -> int:
    return sum(parse_format(name).bytes(rows, launch.k) for rows, name in launch.segments)


def _take(device: Device, samples: Samples, rotation: int, seed: int) -> None:
    """Samples of a launch, on weights made for them."""
    timed = device.timed(samples.launch, rotation, seed)
    try:
        samples.add(timed)
    finally:
        timed.close()


def _cell(samples: Samples, spread: float, fixed_us: float) -> Cell:
    least, low, median, high = (value / 1e3 for value in quartiles(samples.times))
    stable = high - low <= spread * median
    return Cell(
        op="linear",
        m=samples.launch.m,
        k=samples.launch.k,
        segments=list(samples.launch.segments),
        kernel=samples.kernel,
        activations=samples.activations,
        median_us=median,
        p25_us=low,
        p75_us=high,
        min_us=least,
        n=len(samples.times),
        bytes=samples.bytes,
        fixed=min(1.0, fixed_us / median),
        error=samples.error,
        status="ok" if stable else "unstable",
    )


def _unsupported(launch: Launch, why: str) -> Cell:
    return Cell(
        op="linear",
        m=launch.m,
        k=launch.k,
        segments=list(launch.segments),
        kernel="",
        activations="",
        median_us=0,
        p25_us=0,
        p75_us=0,
        min_us=0,
        n=0,
        bytes=0,
        fixed=0,
        error=0,
        status="unsupported",
        why=why,
    )
