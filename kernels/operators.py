"""Products with fused integer matrices, as operators of torch.

`plane_matmul` is x·Wᵀ + bias: on a CUDA device the kernel for that many rows, on any other the
reference. `plane_dequantize` is W in 16 bits. Both run under torch.compile and in CUDA graphs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.kernels import entries
from bitsearch.kernels.driver import load
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.partition import Partition, Tuning, partition
from bitsearch.kernels.planes import Shape

STREAM_ROWS = 16  # most rows of x that the streaming kernel takes
TUNING = Tuning()


def matmul(x: Tensor, weight: Fused, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ (+ bias), of the type of x.

    Args:
        x: (…, columns) float16 or bfloat16 on a CUDA device; any float type elsewhere.
        weight: the fused matrix, on the device of x.
        bias: (rows,) of the type of x, or None.

    Raises:
        BadInput: shapes, types or devices do not match.
    """
    if x.shape[-1] != weight.columns:
        raise BadInput(f"inputs have {x.shape[-1]} features, the weight {weight.columns}")
    if x.is_cuda and x.dtype not in entries.TYPES:
        raise BadInput(f"kernels take float16 and bfloat16, not {x.dtype}")
    flat = x.reshape(-1, weight.columns)
    out = torch.ops.bitsearch.plane_matmul(flat, weight.data, shape_list(weight.shapes), bias)
    return out.view(*x.shape[:-1], weight.rows)  # type: ignore[no-any-return]


def dequantize(weight: Fused, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of a 16-bit type, each weight rounded once."""
    out: Tensor = torch.ops.bitsearch.plane_dequantize(
        weight.data, shape_list(weight.shapes), dtype
    )
    return out


def shape_list(shapes: Sequence[Shape]) -> list[int]:
    """Shapes as the integers that operators take."""
    return [
        value
        for shape in shapes
        for value in (shape.bits, shape.group, int(shape.symmetric), shape.rows, shape.columns)
    ]


def _shapes(values: Sequence[int]) -> tuple[Shape, ...]:
    return tuple(
        Shape(bits, group, bool(symmetric), rows, columns)
        for bits, group, symmetric, rows, columns in zip(*[iter(values)] * 5, strict=True)
    )


@torch.library.custom_op("bitsearch::plane_matmul", mutates_args=())
def plane_matmul(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None) -> Tensor:
    """The reference: float32 products with the dequantized weights."""
    weight = Fused(_shapes(shapes), data).dequantize()
    out = x.float() @ weight.T
    return (out if bias is None else out + bias.float()).to(x.dtype)


@plane_matmul.register_fake
def _(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], sum(shapes[3::5]))


@plane_matmul.register_kernel("cuda")
def _(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.data_ptr() % 16 or not x.shape[0]:
        x = x.clone()
    if x.shape[0] > STREAM_ROWS:
        weight = _dequantize_cuda(data, _shapes(shapes), x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], sum(shapes[3::5]))
    if x.shape[0]:
        stream(x, Fused(_shapes(shapes), data), bias, out, TUNING)
    return out


@torch.library.custom_op("bitsearch::plane_dequantize", mutates_args=())
def plane_dequantize(data: Tensor, shapes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The reference: float32, rounded once."""
    return Fused(_shapes(shapes), data).dequantize().to(dtype)


@plane_dequantize.register_fake
def _(data: Tensor, shapes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return data.new_empty(sum(shapes[3::5]), shapes[4], dtype=dtype)


@plane_dequantize.register_kernel("cuda")
def _(data: Tensor, shapes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _dequantize_cuda(data, _shapes(shapes), dtype)


def _dequantize_cuda(data: Tensor, shapes: tuple[Shape, ...], dtype: torch.dtype) -> Tensor:
    columns, blocks = shapes[0].columns, sum(shape.blocks for shape in shapes)
    out = data.new_empty(sum(shape.rows for shape in shapes), columns, dtype=dtype)
    kernel = load(entries.dequantize(dtype, entries.kinds(shapes)), data.device.index)
    tiles = shapes[0].tiles
    args = entries.DequantizeArgs(
        data.data_ptr(),
        out.data_ptr(),
        columns,
        tiles,
        blocks,
        len(shapes),
        entries.segments(shapes),
    )
    grid = min(-(-blocks * tiles // 8), 8 * _processors(data.device.index))
    with torch.cuda.device(data.device):
        kernel.launch(grid, 256, 0, args)
    return out


@dataclass(frozen=True, slots=True)
class _Launch:
    """A partition whose tables are on a device.

    Attributes:
        partition: how work is dealt out.
        plan: on the device.
        segments: on the host.
        arrived: counters, all zero between launches; of one stream.
    """

    partition: Partition
    plan: Tensor
    segments: ctypes.Array[entries.Segment]
    arrived: Tensor


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
        number = torch.cuda.current_stream().cuda_stream
        launch = _plan(weight.shapes, m, device, number, tuning)
        plan = launch.partition
        kernel = load(entries.stream(x.dtype, m, entries.kinds(weight.shapes), tuning), device)
        kernel.allow_shared(plan.shared_bytes)
        blocks = sum(shape.blocks for shape in weight.shapes)
        partial = x.new_empty(
            blocks * plan.splits * 16 * m if plan.splits > 1 else 0, dtype=torch.float32
        )
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
        grid = len(plan.plan)
        kernel.launch(grid, 32 * tuning.warps, plan.shared_bytes, args, overlap=overlap)


@cache
def _plan(shapes: tuple[Shape, ...], m: int, device: int, stream: int, tuning: Tuning) -> _Launch:
    limit = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    found = partition(shapes, m, _processors(device), limit, tuning)
    place = torch.device("cuda", device)
    return _Launch(
        found,
        torch.from_numpy(found.plan).to(place),
        entries.segments(shapes),
        torch.zeros(sum(shape.blocks for shape in shapes), dtype=torch.int32, device=place),
    )


def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
