"""Launch the CUDA kernels on tensors: partitions, counters and partial sums are kept here."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bitsearch.kernels import entries
from bitsearch.kernels.batch_partition import BatchPartition, batch_partition
from bitsearch.kernels.driver import load
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.partition import Partition, Tuning, fitting, partition
from bitsearch.kernels.planes import Shape

P = TypeVar("P", Partition, BatchPartition)


@dataclass(frozen=True, slots=True)
class _Launch(Generic[P]):
    """A partition whose tables are on a device.

    Attributes:
        partition: how work is dealt out.
        plan: on the device.
        segments: on the host.
        arrived: counters, all zero between launches; of one stream.
    """

    partition: P
    plan: Tensor
    segments: ctypes.Array[entries.Segment]
    arrived: Tensor


# Found by experiments/gpu on an H100, by units of 8 rows of x and the widest segment; of asymmetric
# segments with several groups a tile; and, not timed, of more than three kinds, whose kernels need
# more registers than more warps would leave. With up to 8 rows, a block must have a
# multiprocessor to itself, by its registers or its shared memory: where two fit, a whole model took
# far longer than its launches do alone, most likely since blocks of one launch then share some
# multiprocessors while others idle.
TUNED = {
    **{(1, bits): Tuning(20, 3) for bits in range(1, 6)},
    **{(1, bits): Tuning(12, 6) for bits in range(6, 9)},
    **{(2, bits): Tuning(16, 4) for bits in (1, 2, 4)},
    (2, 5): Tuning(16, 3),
    **{(2, bits): Tuning(16, 2) for bits in (3, 6, 7, 8)},
}
TUNED_GROUPED, TUNED_MANY = Tuning(16, 2), Tuning(12, 3)


def tuning_of(shapes: tuple[Shape, ...], m: int) -> Tuning:
    """How the streaming kernel is best built."""
    units = -(-m // 8)
    if len(entries.kinds(shapes)) > 3:
        return TUNED_MANY
    if any(shape.groups > 1 and not shape.symmetric for shape in shapes):
        return TUNED_GROUPED
    return TUNED[units, max(shape.bits for shape in shapes)]


@cache
def tuning_for(shapes: tuple[Shape, ...], m: int, device: int) -> Tuning:
    """How the streaming kernel is built for a device: best, or as there is room for it."""
    return fitting(shapes, m, processors(device), _shared(device), tuning_of(shapes, m))


def stream(
    x: Tensor,
    weight: Fused,
    bias: Tensor | None,
    out: Tensor,
    tuning: Tuning,
    overlap: bool = False,
) -> None:
    """The streaming kernel: x·Wᵀ + bias into `out`, for up to 16 rows of x.

    Args:
        x: (m, columns) float16 or bfloat16, 16-byte aligned.
        weight: the fused matrix.
        bias: (rows,) or None.
        out: (m, rows).
        tuning: how the kernel is built.
        overlap: start before the kernel before has ended; it must not write the weight.
    """
    m, device = x.shape[0], x.device.index
    with torch.cuda.device(device):
        launch = _stream_plan(weight.shapes, m, device, _stream(), tuning)
        plan = launch.partition
        entry = entries.stream(x.dtype, m, entries.kinds(weight.shapes), tuning)
        kernel = load(entry, device)
        kernel.allow_shared(plan.shared_bytes)
        size = _blocks(weight.shapes) * plan.splits * 16 * m if plan.splits > 1 else 0
        partial = x.new_empty(size, dtype=torch.float32)
        args = entries.StreamArgs(
            x.data_ptr(),
            weight.data.data_ptr(),
            launch.plan.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            partial.data_ptr() or None,
            launch.arrived.data_ptr(),
            m,
            weight.columns,
            x.stride(0),
            out.stride(0),
            weight.shapes[0].tiles,
            plan.splits,
            plan.slot_bytes,
            plan.capacity,
            launch.segments,
        )
        kernel.launch(len(plan.plan), 32 * tuning.warps, plan.shared_bytes, args, overlap=overlap)


def batch(
    x: Tensor,
    weight: Fused,
    bias: Tensor | None,
    out: Tensor,
    scales: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """The batch kernel: x·Wᵀ + bias into `out`.

    Args:
        x: (m, columns or more) float16, bfloat16 or bytes of `tokens`, 16-byte aligned; zeros
            past the columns.
        weight: the fused matrix.
        bias: (rows,) or None.
        out: (m, rows), float16 or bfloat16.
        scales: (m,) of bytes.
        overlap: start before the kernel before has ended; it must not write the weight.
    """
    m, device = x.shape[0], x.device.index
    with torch.cuda.device(device):
        launch = _batch_plan(weight.shapes, m, device, _stream())
        plan = launch.partition
        kinds = entries.kinds(weight.shapes)
        kernel = load(entries.batch(out.dtype, plan.cols, kinds, scales is not None), device)
        kernel.allow_shared(plan.shared_bytes)
        size = plan.grid * plan.values if plan.splits > 1 else 0
        partial = x.new_empty(size, dtype=torch.float32)
        args = entries.BatchArgs(
            x.data_ptr(),
            None if scales is None else scales.data_ptr(),
            weight.data.data_ptr(),
            launch.plan.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            partial.data_ptr() or None,
            launch.arrived.data_ptr(),
            m,
            x.shape[1],
            x.stride(0),
            out.stride(0),
            weight.shapes[0].tiles,
            plan.splits,
            plan.slot_bytes,
            plan.row_tiles,
            launch.segments,
        )
        kernel.launch(plan.grid, 256, plan.shared_bytes, args, overlap=overlap)


def tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x as signed bytes, (m, columns rounded up to 16), and their (m,) scales."""
    m, columns = x.shape
    out = x.new_empty(m, -(-columns // 16) * 16, dtype=torch.int8)
    scales = x.new_empty(m, dtype=torch.float32)
    args = entries.TokenArgs(
        x.data_ptr(), out.data_ptr(), scales.data_ptr(), columns, x.stride(0), out.stride(0)
    )
    with torch.cuda.device(x.device):
        load(entries.tokens(x.dtype), x.device.index).launch(m, 256, 1024, args)
    return out, scales


def dequantize(weight: Fused, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of a 16-bit type, each weight rounded once."""
    data, device = weight.data, weight.data.device.index
    out = data.new_empty(weight.rows, weight.columns, dtype=dtype)
    blocks, tiles = _blocks(weight.shapes), weight.shapes[0].tiles
    args = entries.DequantizeArgs(
        data.data_ptr(),
        out.data_ptr(),
        weight.columns,
        tiles,
        blocks,
        len(weight.shapes),
        entries.segments(weight.shapes),
    )
    grid = min(-(-blocks * tiles // 8), 8 * processors(device))
    with torch.cuda.device(device):
        kernel = load(entries.dequantize(dtype, entries.kinds(weight.shapes)), device)
        kernel.launch(grid, 256, 0, args)
    return out


@cache
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _shared(device: int) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@cache
def _stream_plan(
    shapes: tuple[Shape, ...], m: int, device: int, stream: int, tuning: Tuning
) -> _Launch[Partition]:
    found = partition(shapes, m, processors(device), _shared(device), tuning)
    place = torch.device("cuda", device)
    return _Launch(
        found,
        torch.from_numpy(found.plan).to(place),
        entries.segments(shapes),
        torch.zeros(_blocks(shapes), dtype=torch.int32, device=place),
    )


@cache
def _batch_plan(
    shapes: tuple[Shape, ...], m: int, device: int, stream: int
) -> _Launch[BatchPartition]:
    found = batch_partition(shapes, m, processors(device))
    place = torch.device("cuda", device)
    return _Launch(
        found,
        torch.from_numpy(found.plan).to(place),
        entries.segments(shapes),
        torch.zeros(found.row_tiles * found.column_tiles, dtype=torch.int32, device=place),
    )


def _blocks(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.blocks for shape in shapes)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
