"""What can run a format: the devices, and the questions that each answers.

A device is opened by name, says which of its kernels executes a launch, times
that kernel on weights which no cache holds, and runs it on weights of ours.
Other packages add theirs under the entry-point group `bitsearch.devices`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bitsearch import registry
from bitsearch.errors import BadInput, BitsearchError

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.kernels.decoder_shape import DecoderShape
    from bitsearch.kernels.regime import Regime
    from bitsearch.quantizers.codec import Encoded
    from bitsearch.units import Unit

    Parts = Sequence[Encoded | Tensor]
    Linear = Callable[[Tensor], Tensor]
    UnitParts = Callable[[Unit], tuple[str, Parts | None]]
    Vectors = Callable[[str], NDArray[np.float32]]

log = logging.getLogger(__name__)

GROUP = "bitsearch.devices"
DEVICES = {
    "ggml": "bitsearch.kernels.ggml_device:open_device",
    "onnxruntime": "bitsearch.kernels.onnxruntime_device:open_device",
    "torch-cpu": "bitsearch.kernels.torch_cpu:open_device",
    "cuda": "bitsearch.kernels.cuda_device:open_device",
}
AUTO = ("ggml", "torch-cpu")  # by preference


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a matrix kernel: (m, k) activations times (n, k) weights, transposed.

    Attributes:
        m: tokens.
        k: input features.
        segments: rows and format name of each run of rows in one format, in row
            order. Most kernels take one segment; a fused set in one format is one.
    """

    m: int
    k: int
    segments: tuple[tuple[int, str], ...]

    @property
    def n(self) -> int:
        """Output features."""
        return sum(rows for rows, _ in self.segments)


class NoKernel(BitsearchError):
    """A device has no kernel for a launch; the message says why, in one line."""

    exit_code = 4


class Timed(Protocol):
    """A launch with weights in place, ready to be timed.

    Attributes:
        kernel: what the device calls the kernel.
        activations: the type that the kernel multiplies in, e.g. `int8` or `float32`.
        bytes: of weights with their scales, inputs and outputs of one launch.
        error: largest |y − y₆₄| / max |y₆₄| on random inputs, where y₆₄ is
            computed in float64 from the dequantized weights.
    """

    kernel: str
    activations: str
    bytes: int
    error: float

    def sample(self) -> float:
        """Nanoseconds a launch, over one pass through all copies of the weights."""

    def close(self) -> None:
        """Free the memory."""


@dataclass(frozen=True, slots=True)
class Stability:
    """When a device's timings count.

    Attributes:
        spread: largest interquartile range of a cell, as a share of its median.
        drift: largest drift of the sentinel over a run, as a share.
        error: most mean and worst error of predicted times, for a table to be good for
            times, and the least rank correlation, for a ranking.
    """

    spread: float
    drift: float
    error: tuple[float, float, float]


class Device(Protocol):
    """What every device answers.

    Attributes:
        name: as it is registered.
        place: torch's name of where its inputs and outputs lie, such as `cpu`.
        dtype: torch's name of their type.
        clock: what times are read from: `wall`, `thread` (processor time of the one
            thread that computes) or `events`.
        stability: when its timings count.
    """

    name: str
    place: str
    dtype: str
    clock: str
    stability: Stability

    def machine(self) -> dict[str, str]:
        """What a time depends on; a table of other values is of another machine."""

    def source(self) -> str:
        """Version of the kernels: that of a library, or the hash of a source of our own."""

    def threads(self) -> int | None:
        """Processor threads that compute; None where that says nothing."""

    def facts(self) -> dict[str, Any]:
        """What else the header of a table says: drivers, clocks, caches, energy counter."""

    def cache_bytes(self) -> int:
        """Size of the last-level cache."""

    def calibrate(self) -> dict[str, float]:
        """Measured `launch_us`, `read_gbps` and `gflops`, for the analytic model."""

    def formats(self) -> tuple[str, ...]:
        """Names of the formats that its tables hold unless others are asked for."""

    def now(self) -> int:
        """Nanoseconds on its clock, once what was launched is done."""

    def kernel(self, launch: Launch) -> str:
        """The kernel that executes a launch.

        Raises:
            NoKernel: there is none.
        """

    def timed(self, launch: Launch, rotation: int, seed: int) -> Timed:
        """Random weights in place, in as many copies as fill `rotation` bytes.

        Raises:
            NoKernel: no kernel executes the launch.
        """

    def linear(self, launch: Launch, parts: Parts | None) -> Linear:
        """What runs a launch on weights of ours: (m, k) to (m, n).

        Args:
            launch: which; every call has its m tokens.
            parts: the matrices of the launch in row order, encoded in its format; of a
                16-bit format the weights themselves. None: random ones.

        Raises:
            NoKernel: no kernel executes it.
        """


class Step(Protocol):
    """Something of a model that runs again and again."""

    def sample(self) -> tuple[float, float]:
        """Nanoseconds of one run: on the device's clock, and on the wall's."""

    def close(self) -> None:
        """Free what it alone holds."""


class Assembled(Protocol):
    """A model with every unit in a format, on a device."""

    @property
    def step(self) -> Step:
        """Everything that a step computes, from token ids to logits."""

    @property
    def stack(self) -> Step:
        """Its launches alone, in the same order on the same weights."""

    def close(self) -> None:
        """Free the memory."""


@runtime_checkable
class OwnDecoder(Protocol):
    """A device that runs whole decoders of the Llama kind by itself."""

    def decoder(
        self, shape: DecoderShape, units: UnitParts, vectors: Vectors, regime: Regime
    ) -> Assembled:
        """A model of a shape, each unit with its format and weights.

        Args:
            shape: what it computes.
            units: a unit's format name, and its matrices; None draws random ones.
            vectors: norms and biases by parameter name.
            regime: of its steps.
        """


Opener = Callable[[int], Device]


def device_names() -> list[str]:
    """Every registered name."""
    return registry.names(GROUP, DEVICES)


def open_device(name: str, threads: int) -> Device:
    """A device by name; `auto` is the first of `AUTO` that works here.

    Args:
        name: as registered, or `auto`.
        threads: of a processor; other devices ignore it.

    Raises:
        UsageError: nobody registered that name.
        BadInput: the device, or a package that it needs, is not here.
    """
    if name != "auto":
        return cast(Opener, registry.load(GROUP, DEVICES, name))(threads)
    for candidate in AUTO[:-1]:
        try:
            return open_device(candidate, threads)
        except BadInput as error:
            log.info("not on %s: %s", candidate, error)
    return open_device(AUTO[-1], threads)


def machine_name(machine: Mapping[str, str]) -> str:
    """A machine in one line."""
    return ", ".join(value for value in machine.values() if value)
