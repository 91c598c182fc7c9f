"""What all devices share that compute on the processor."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from typing import Any

from bitsearch.kernels import processor
from bitsearch.kernels.devices import Launch, Stability, Timed

# On a processor that other programs use too; a quiet one does better.
STABILITY = Stability(spread=0.15, drift=0.20, error=(0.08, 0.15, 0.95))
_MOST_COPIES = 4096
_CALIBRATION_FORMAT = "bf16"


def copies_for(size: int, rotation: int) -> int:
    """How many copies of so many bytes fill a rotation; two at least, some thousand at most."""
    return min(_MOST_COPIES, max(2, -(-rotation // max(1, size))))


class OnProcessor(ABC):
    """The part of a device that is the processor's, whatever computes on it."""

    name: str
    place = "cpu"
    dtype = "float32"
    stability = STABILITY

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.clock = processor.clock(threads)

    def now(self) -> int:
        return processor.now(self.clock)

    def machine(self) -> dict[str, str]:
        return processor.processor()

    def threads(self) -> int:
        return self._threads

    def facts(self) -> dict[str, Any]:
        return {"cache_bytes": self.cache_bytes(), "energy": _energy()}

    def cache_bytes(self) -> int:
        return processor.last_level_cache()

    def calibrate(self) -> dict[str, float]:
        """From 16-bit launches: the smallest, one that streams, one that computes."""
        rotation = 2 * self.cache_bytes()
        small, _ = self._measured(Launch(1, 64, ((32, _CALIBRATION_FORMAT),)), 1 << 20)
        streaming, size = self._measured(Launch(1, 2048, ((2048, _CALIBRATION_FORMAT),)), rotation)
        computing, _ = self._measured(Launch(64, 1024, ((1024, _CALIBRATION_FORMAT),)), rotation)
        return {
            "launch_us": small / 1e3,
            "read_gbps": size / streaming,
            "gflops": 2 * 64 * 1024 * 1024 / computing,
        }

    @abstractmethod
    def timed(self, launch: Launch, rotation: int, seed: int) -> Timed:
        """As every `Device` has it."""

    def _measured(self, launch: Launch, rotation: int) -> tuple[float, int]:
        """Median nanoseconds of a launch, and its bytes."""
        timed = self.timed(launch, rotation, 0)
        try:
            timed.sample()
            return statistics.median(timed.sample() for _ in range(5)), timed.bytes
        finally:
            timed.close()


def _energy() -> str:
    counter = processor.energy_counter()
    why = "no counter can be read" if counter is None else f"{counter} is there, and not read yet"
    return f"no energy: {why}"
