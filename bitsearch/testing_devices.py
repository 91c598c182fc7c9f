"""The contract of a device, and a device whose times are known.

from bitsearch.testing_devices import check_device
check_device(open_device(1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitsearch.formats import parse_format
from bitsearch.kernels.devices import Device, Launch, NoKernel, Stability
from bitsearch.kernels.random_weights import inputs, random_parts, relative_error
from bitsearch.kernels.regime import Regime, is_launched, launch_of

if TYPE_CHECKING:
    from bitsearch.kernels.decoder_shape import DecoderShape
    from bitsearch.kernels.devices import Linear, Parts, UnitParts, Vectors

LARGEST_ERROR = 0.03  # of any kernel, beside float64 on the values of its format


def check_device(device: Device) -> None:
    """Run a device's every format on small shapes.

    Raises:
        AssertionError: a kernel computes something else than its format stands for, a
            time or a size makes no sense, or a refusal is no line of text.
    """
    import torch

    assert device.formats(), "a device runs some format"
    assert all(isinstance(value, str) for value in device.machine().values())
    assert device.source() and device.cache_bytes() > 0
    run = 0
    for name in device.formats():
        for m, n, k in ((1, 64, 512), (3, 320, 768)):
            launch = Launch(m, k, ((n, name),))
            try:
                kernel = device.kernel(launch)
            except NoKernel as refused:
                assert str(refused) and "\n" not in str(refused)
                continue
            run += 1
            parts, values = random_parts(launch, 0)
            x = inputs(m, k, 0)
            given = torch.from_numpy(x).to(device.place, getattr(torch, device.dtype))
            found = device.linear(launch, parts)(given)
            assert found.shape == (m, len(values) * len(parts)) or found.shape == (m, n)
            error = relative_error(found.float().cpu().numpy()[:, :n], x, values)
            assert error < LARGEST_ERROR, f"{name} at {n} × {k}: error {error:.3f}"
            assert device.linear(launch, None)(given).shape[0] == m
            timed = device.timed(launch, 1 << 20, 0)
            try:
                assert timed.kernel == kernel and timed.sample() > 0
                assert 0 < timed.error < LARGEST_ERROR, f"{name}: error {timed.error:.3f}"
                assert timed.bytes >= n * k * parse_format(name).bits // 8
            finally:
                timed.close()
    assert run, "no format ran at any shape"
    calibration = device.calibrate()
    assert {"launch_us", "read_gbps", "gflops"} <= calibration.keys()
    assert all(value > 0 for value in calibration.values())


@dataclass
class Clockwork:
    """A device whose times follow a formula: for tests of what uses times.

    A launch of n × k weights takes `launch + n · k · (rate[format] + m · each)`
    nanoseconds, a step `rest · batch · tokens` more, all times `factor(units)`.

    Attributes:
        rate: nanoseconds a weight by format name; others have no kernel.
        launch, each, rest: as above.
        factor: what a whole step takes beside its prediction, by the units' formats.
        inside: nanoseconds that a launch takes more inside a step, of those that it takes alone.
        noise: factors of the samples that `timed` gives, one after another.
    """

    rate: Mapping[str, float]
    launch: float = 1000.0
    each: float = 0.1
    rest: float = 50_000.0
    factor: Callable[[Mapping[str, str]], float] = lambda formats: 1.0
    inside: Callable[[float], float] = lambda alone: 0.0
    noise: Iterator[float] | None = None
    name: str = "clockwork"
    place: str = "cpu"
    dtype: str = "float32"
    clock: str = "wall"
    identity: dict[str, str] = field(default_factory=lambda: {"name": "clockwork"})
    stability: Stability = field(default_factory=lambda: Stability(0.15, 0.20, (0.08, 0.15, 0.95)))

    def machine(self) -> dict[str, str]:
        return dict(self.identity)

    def source(self) -> str:
        return "clockwork 1"

    def threads(self) -> int | None:
        return 1

    def facts(self) -> dict[str, Any]:
        return {"energy": "no energy"}

    def cache_bytes(self) -> int:
        return 1 << 20

    def calibrate(self) -> dict[str, float]:
        return {"launch_us": self.launch / 1e3, "read_gbps": 10.0, "gflops": 100.0}

    def formats(self) -> tuple[str, ...]:
        return tuple(self.rate)

    def now(self) -> int:
        return 0

    def kernel(self, launch: Launch) -> str:
        name = launch.segments[0][1]
        if name not in self.rate:
            raise NoKernel(f"clockwork has no kernel for {name}")
        return name

    def nanoseconds(self, launch: Launch) -> float:
        """What the formula says."""
        rate = self.rate[self.kernel(launch)]
        return self.launch + launch.n * launch.k * (rate + launch.m * self.each)

    def timed(self, launch: Launch, rotation: int, seed: int) -> ClockworkTimed:
        return ClockworkTimed(self, launch)

    def linear(self, launch: Launch, parts: Parts | None) -> Linear:
        import torch

        self.kernel(launch)
        parts = random_parts(launch, 0)[0] if parts is None else parts
        weights = torch.cat(
            [part if isinstance(part, torch.Tensor) else part.dequantize() for part in parts]
        )
        return lambda x: x @ weights[: launch.n].float().T

    def decoder(
        self, shape: DecoderShape, units: UnitParts, vectors: Vectors, regime: Regime
    ) -> ClockworkModel:
        inside = [unit for block in shape.blocks for unit in block.units.values()]
        all_units = {u.name: u for u in (shape.embedding, *inside, shape.head)}
        formats = {name: units(unit)[0] for name, unit in all_units.items()}
        alone = [
            self.nanoseconds(launch_of(unit, formats[name], regime))
            for name, unit in all_units.items()
            if is_launched(unit, shape.head is shape.embedding)
        ]
        step = sum(time + self.inside(time) for time in alone) + self.rest * regime.rows
        return ClockworkModel(Constant(step * self.factor(formats)), Constant(sum(alone)))


@dataclass
class ClockworkTimed:
    """A launch of the clockwork."""

    device: Clockwork
    what: Launch
    activations: str = "float64"
    error: float = 0.001

    @property
    def kernel(self) -> str:
        return self.device.kernel(self.what)

    @property
    def bytes(self) -> int:
        return parse_format(self.kernel).bytes(self.what.n, self.what.k)

    def sample(self) -> float:
        noise = 1.0 if self.device.noise is None else next(self.device.noise)
        return self.device.nanoseconds(self.what) * noise

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class Constant:
    """A step that always takes as long."""

    nanoseconds: float

    def sample(self) -> tuple[float, float]:
        return self.nanoseconds, self.nanoseconds

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class ClockworkModel:
    """A model on the clockwork."""

    step: Constant
    stack: Constant

    def close(self) -> None:
        """Nothing to free."""
