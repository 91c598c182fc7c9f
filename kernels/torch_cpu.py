"""The processor through torch's own kernels: int4 and int8 weights, and bfloat16.

    int4-gG (-sym)   `_weight_int4pack_mm_for_cpu`, G of 32, 64, 128 or 256
    int8-row-sym     `_weight_int8pack_mm`
    bf16             `linear`

All multiply in bfloat16, which is many times faster than their float32 paths; the
int4 kernel also wants its scales in bfloat16, which moves them by up to 0.4 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitsearch.formats import Format, parse_format
from bitsearch.kernels.devices import Launch, NoKernel
from bitsearch.kernels.on_processor import OnProcessor, copies_for
from bitsearch.kernels.random_weights import inputs, random_parts, relative_error

if TYPE_CHECKING:
    from bitsearch.kernels.devices import Linear, Parts

_GROUPS = (32, 64, 128, 256)
_ROWS = 16  # rows of an int4 matrix come in such many

Packed = tuple[Tensor, ...]


class TorchCpu(OnProcessor):
    """torch's kernels on this processor, on a number of threads."""

    name = "torch-cpu"
    dtype = "bfloat16"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)

    def source(self) -> str:
        return f"torch {torch.__version__}"

    def kernel(self, launch: Launch) -> str:
        if len(launch.segments) != 1:
            raise NoKernel("torch-cpu runs one format a launch, not several")
        format = parse_format(launch.segments[0][1])
        if format.kind == "bf16":
            return "linear"
        if format.kind == "int" and format.bits == 8:
            if format.symmetric and format.group_size is None:
                return "int8pack"
            raise NoKernel(f"torch-cpu has no kernel for {format.name}; of 8 bits int8-row-sym")
        if format.kind != "int" or format.bits != 4 or format.group_size not in _GROUPS:
            raise NoKernel(
                f"torch-cpu has no kernel for {format.name}; it has int4 in groups of 32, 64, "
                "128 or 256, int8-row-sym and bf16"
            )
        if launch.k % format.group_size or launch.n % _ROWS:
            raise NoKernel(
                f"torch-cpu's {format.name} needs columns in whole groups and rows in multiples "
                f"of {_ROWS}, not {launch.n} x {launch.k}"
            )
        return "int4pack"

    def timed(self, launch: Launch, rotation: int, seed: int) -> TorchTimed:
        return TorchTimed(self, launch, rotation, seed)

    def formats(self) -> tuple[str, ...]:
        return (*(f"int4-g{size}" for size in _GROUPS), "int8-row-sym", "bf16")

    def linear(self, launch: Launch, parts: Parts | None) -> Linear:
        kernel, format = self.kernel(launch), parse_format(launch.segments[0][1])
        weights = packed(kernel, format, parts or random_parts(launch, 0)[0], launch.n)
        return lambda x: run(kernel, format, x, weights)


class TorchTimed:
    """One multiplication on many copies of random weights."""

    activations = "bfloat16"

    def __init__(self, device: TorchCpu, launch: Launch, rotation: int, seed: int) -> None:
        self.kernel = device.kernel(launch)
        self._format = parse_format(launch.segments[0][1])
        self._device = device
        parts, values = random_parts(launch, seed)
        whole = packed(self.kernel, self._format, parts, launch.n)
        size = sum(tensor.nbytes for tensor in whole)
        self.bytes = size + 2 * launch.m * (launch.n + launch.k)
        self._weights = [
            tuple(tensor.clone() for tensor in whole) for _ in range(copies_for(size, rotation))
        ]
        given = inputs(launch.m, launch.k, seed)
        self._x = torch.from_numpy(given).bfloat16()
        found = run(self.kernel, self._format, self._x, self._weights[0]).float().numpy()
        self.error = relative_error(found, given, values)

    def sample(self) -> float:
        start = self._device.now()
        for weights in self._weights:
            run(self.kernel, self._format, self._x, weights)
        return (self._device.now() - start) / len(self._weights)

    def close(self) -> None:
        self._weights.clear()


def packed(kernel: str, format: Format, parts: Parts, rows: int | None = None) -> Packed:
    """The first `rows` of stacked matrices as a kernel takes them."""
    if kernel == "linear":
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return (torch.cat(tensors)[:rows].bfloat16(),)
    integers: list[Any] = list(parts)
    codes = torch.cat([part.codes for part in integers])[:rows]
    scales = torch.cat([part.scales for part in integers])[:rows].float()
    if kernel == "int8pack":
        return (codes.int() - 128).to(torch.int8), scales[:, 0].bfloat16()
    zeros = torch.cat([part.zeros for part in integers])[:rows].float()
    # The kernel's weight is (code − 8) · scale + zero, ours (code − zero point) · scale.
    shifts = scales * (2 ** (format.bits - 1) - zeros)
    both = torch.stack([scales.T, shifts.T], dim=2).bfloat16().contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), both


def run(kernel: str, format: Format, x: Tensor, weights: Packed) -> Tensor:
    """(m, k) bfloat16 inputs to (m, n) bfloat16 outputs."""
    if kernel == "linear":
        return linear(x, weights[0])
    operation = torch.ops.aten
    if kernel == "int8pack":
        found: Tensor = operation._weight_int8pack_mm(x, *weights)
        return found
    found = operation._weight_int4pack_mm_for_cpu(x, weights[0], format.group_size, weights[1])
    return found


def open_device(threads: int) -> TorchCpu:
    """torch's own int4, int8 and bfloat16 kernels; nothing more to install."""
    return TorchCpu(threads)
