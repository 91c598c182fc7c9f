"""NVIDIA devices: integers of 2 to 8 bits by our own kernels, 16 bits by the library's.

    int2..8, groups of 32k columns or a row   stream (to 16 rows), batch (to 128), dequantize
                                              and cublas; several formats a launch
    bf16                                      cublas

All in bfloat16. Times are those of CUDA graphs.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.kernels.calibrate import calibrate
from bitsearch.kernels.cuda_decoder import CudaModel
from bitsearch.kernels.devices import Launch, NoKernel, Stability
from bitsearch.kernels.fused import MAX_SEGMENTS, Fused, fuse
from bitsearch.kernels.nvrtc import source_hash
from bitsearch.kernels.operators import kernel_of, matmul
from bitsearch.kernels.planes import device_group, of_quantized
from bitsearch.kernels.random_planes import Part, random_fused, random_input
from bitsearch.kernels.replay import Replay

if TYPE_CHECKING:
    from bitsearch.kernels.decoder_shape import DecoderShape
    from bitsearch.kernels.devices import Linear, Parts, UnitParts, Vectors
    from bitsearch.kernels.regime import Regime

STABILITY = Stability(spread=0.05, drift=0.03, error=(0.05, 0.10, 0.98))
_MOST_COPIES = 64
_LEAST_LAUNCHES = 24  # of a graph
_WARM_SECONDS = 0.02  # under load, until clocks have risen
_LEAST_NANOSECONDS = 1e6  # of a sample, so that the start of its graph does not count


class Cuda:
    """The first CUDA device of torch."""

    name = "cuda"
    place = "cuda:0"
    dtype = "bfloat16"
    clock = "events"
    stability = STABILITY

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BadInput(
                "device cuda needs an NVIDIA GPU and a CUDA build of torch; there is none here"
            )
        self._properties = torch.cuda.get_device_properties(0)

    def machine(self) -> dict[str, str]:
        found = self._properties
        return {
            "name": str(found.name),
            "processors": f"{found.multi_processor_count} multiprocessors",
            "memory": f"{found.total_memory / 2**30:.0f} GiB",
        }

    def source(self) -> str:
        return source_hash()[:16]

    def threads(self) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            values = dict(zip(query.split(","), said.strip().split(", "), strict=True))
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            values = {"driver_version": f"unknown: nvidia-smi does not tell ({error})"}
        return {
            "cache_bytes": self.cache_bytes(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "energy": "no energy: no counter was read",
            **values,
        }

    def cache_bytes(self) -> int:
        return int(self._properties.L2_cache_size)

    def calibrate(self) -> dict[str, float]:
        return calibrate(0)

    def formats(self) -> tuple[str, ...]:
        return (*(f"int{bits}-g64" for bits in range(2, 9)), "bf16")

    def now(self) -> int:
        torch.cuda.synchronize()
        return time.perf_counter_ns()

    def kernel(self, launch: Launch) -> str:
        formats = [parse_format(name) for _, name in launch.segments]
        if [format.kind for format in formats] == ["bf16"]:
            return "cublas"
        for format in formats:
            if format.kind != "int":
                raise NoKernel(f"cuda has no kernel for {format.name}; it has int2..8 and bf16")
            try:
                device_group(format.group_size, launch.k)
            except BadInput as error:
                raise NoKernel(f"cuda has no kernel for {format.name}: {error}") from error
        if len(formats) > MAX_SEGMENTS:
            raise NoKernel(f"cuda takes {MAX_SEGMENTS} segments a launch, not {len(formats)}")
        return kernel_of(launch.m)

    def timed(self, launch: Launch, rotation: int, seed: int) -> CudaTimed:
        return CudaTimed(self.kernel(launch), launch, rotation, seed)

    def linear(self, launch: Launch, parts: Parts | None) -> Linear:
        if self.kernel(launch) == "cublas":
            dense = _dense(launch, parts)
            return lambda x: linear(x, dense)
        if parts is None:
            drawn = _random(launch.segments, launch.k, 0)
            weight = Fused(drawn.shapes, drawn.data.clone())
        else:
            weight = _given(parts)
        torch.cuda.synchronize()  # from here on a launch may read it before the one before ends
        return lambda x: matmul(x, weight, overlap=True)

    def decoder(
        self, shape: DecoderShape, units: UnitParts, vectors: Vectors, regime: Regime
    ) -> CudaModel:
        """A whole decoder as CUDA graphs; see `devices.OwnDecoder`."""
        return CudaModel(self, shape, units, vectors, regime)


class CudaTimed:
    """One launch on many copies of random weights, as one graph."""

    activations = "bfloat16"

    def __init__(self, kernel: str, launch: Launch, rotation: int, seed: int) -> None:
        self.kernel = kernel
        runs: list[Callable[[], Tensor]]
        x = random_input(launch.m, launch.k, torch.bfloat16, seed, "cuda")
        moved = 2 * launch.m * (launch.n + launch.k)
        if kernel == "cublas":
            dense = _dense(launch, None)
            count = _copies(dense.nbytes, rotation)
            runs = [partial(linear, x, dense.clone()) for _ in range(count)]
            self.bytes = moved + dense.nbytes
            exact = dense.double()
        else:
            weight = _random(launch.segments, launch.k, seed)
            self.bytes = moved + weight.nbytes
            count = _copies(weight.nbytes, rotation)
            copies = [Fused(weight.shapes, weight.data.clone()) for _ in range(count)]
            runs = [partial(matmul, x, copy, overlap=True) for copy in copies]
            exact = weight.dequantize().double()
        want = x.double() @ exact.T
        self.error = float((runs[0]().double() - want).abs().max() / want.abs().max())
        del want, exact
        torch.cuda.synchronize()
        runs *= -(-_LEAST_LAUNCHES // len(runs))
        self._replay = Replay(runs)
        until, took = time.perf_counter() + _WARM_SECONDS, 0.0
        while time.perf_counter() < until:
            took = self._replay.sample()
        self._replays = max(1, math.ceil(_LEAST_NANOSECONDS / (took * len(runs))))

    def sample(self) -> float:
        return self._replay.sample(self._replays)

    def close(self) -> None:
        self._replay.close()


def _copies(size: int, rotation: int) -> int:
    return min(_MOST_COPIES, max(2, -(-rotation // size)))


def _given(parts: Parts) -> Fused:
    integers: list[Any] = list(parts)
    return fuse([of_quantized(part) for part in integers]).to("cuda")


@lru_cache(maxsize=64)
def _random(segments: tuple[tuple[int, str], ...], k: int, seed: int) -> Fused:
    parts: list[Part] = []
    for rows, name in segments:
        format = parse_format(name)
        parts.append((rows, format.bits, format.group_size, format.symmetric))
    return random_fused(parts, k, seed, "cuda")


def _dense(launch: Launch, parts: Parts | None) -> Tensor:
    if parts is None:
        return random_input(launch.n, launch.k, torch.bfloat16, 0, "cuda")
    tensors: list[Any] = list(parts)
    return torch.cat(tensors).to("cuda", torch.bfloat16)


def open_device(threads: int) -> Cuda:
    """The first CUDA device; `threads` says nothing here.

    Raises:
        BadInput: there is none.
    """
    return Cuda()
