"""The entry points of the CUDA sources: C++ text, and the structures that it takes.

Each structure is the one of the same name in `cuda/`, field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch

from bitsearch.kernels.batch_partition import STAGES
from bitsearch.kernels.fused import MAX_SEGMENTS, starts_of
from bitsearch.kernels.partition import Tuning
from bitsearch.kernels.planes import Shape

TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat"}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_REGISTERS = 65536  # of a multiprocessor


class Segment(ctypes.Structure):
    """See segments.cuh."""

    _fields_ = (
        ("offset", ctypes.c_longlong),
        *((name, _INT) for name in ("block_bytes", "bits", "groups", "asymmetric")),
        *((name, _INT) for name in ("row", "rows", "block", "spare")),
    )


class StreamArgs(ctypes.Structure):
    """See stream.cuh."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "data", "plan", "bias", "out", "partial", "arrived")),
        *((name, _INT) for name in ("m", "columns", "x_stride", "out_stride")),
        *((name, _INT) for name in ("tiles", "splits", "slot_bytes", "capacity")),
        ("segments", Segment * MAX_SEGMENTS),
    )


class BatchArgs(ctypes.Structure):
    """See batch.cuh."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "x_scales", "data", "plan")),
        *((name, _POINTER) for name in ("bias", "out", "partial", "arrived")),
        *((name, _INT) for name in ("m", "columns", "x_stride", "out_stride")),
        *((name, _INT) for name in ("tiles", "splits", "slot_bytes", "row_tiles")),
        ("segments", Segment * MAX_SEGMENTS),
    )


class TokenArgs(ctypes.Structure):
    """See tokens.cuh."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "out", "scales")),
        *((name, _INT) for name in ("columns", "x_stride", "out_stride")),
    )


class DequantizeArgs(ctypes.Structure):
    """See dequantize.cuh."""

    _fields_ = (
        *((name, _POINTER) for name in ("data", "out")),
        *((name, _INT) for name in ("columns", "tiles", "blocks", "segment_count")),
        ("segments", Segment * MAX_SEGMENTS),
    )


def segments(shapes: Sequence[Shape]) -> ctypes.Array[Segment]:
    """What the kernels must know of each segment."""
    table = (Segment * MAX_SEGMENTS)()
    row = block = 0
    for i, (shape, start) in enumerate(zip(shapes, starts_of(shapes), strict=True)):
        groups = shape.groups if shape.group else 0
        zeros = int(not shape.symmetric)
        table[i] = Segment(
            start, shape.block_bytes, shape.bits, groups, zeros, row, shape.rows, block, 0
        )
        row, block = row + shape.rows, block + shape.blocks
    return table


Kind = tuple[int, int, bool]


def kinds(shapes: Iterable[Shape]) -> tuple[Kind, ...]:
    """The widths, scales in a tile (0: one a row) and symmetries of segments."""
    found = {(s.bits, s.groups if s.group else 0, not s.symmetric) for s in shapes}
    return tuple(sorted(found))


def stream(dtype: torch.dtype, m: int, kinds: Sequence[Kind], tuning: Tuning) -> str:
    """The streaming kernel for up to 8 or 16 rows of x.

    Its registers are bounded so far that a multiprocessor holds 1024 threads, or as many as the
    compiler manages without memory for them.
    """
    parameters = f"{TYPES[dtype]}, {1 if m <= 8 else 2}, {tuning.warps}, {tuning.stages}"
    grouped = any(zeros and groups > 1 for _, groups, zeros in kinds)
    needed = 128 if m > 8 or len(kinds) > 3 else 80 if grouped else 64
    threads = 32 * tuning.warps
    blocks = max(1, tuning.resident, _REGISTERS // (needed * threads))
    worker = f"Stream<{parameters}, {_list(kinds)}>"
    return _entry("stream", worker, "StreamArgs", f"{threads}, {blocks}")


def tokens(dtype: torch.dtype) -> str:
    """Rows of x to bytes."""
    return (
        '#include "tokens.cuh"\nextern "C" __global__ void __launch_bounds__(256)\n'
        "entry(const __grid_constant__ TokenArgs args) "
        f"{{ quantize_token<{TYPES[dtype]}>(args); }}\n"
    )


def batch(dtype: torch.dtype, cols: int, kinds: Sequence[Kind], integers: bool = False) -> str:
    """The batch kernel for tiles of 8·cols rows of x, in 16 bits or in signed bytes."""
    element = f"Bytes<{TYPES[dtype]}>" if integers else TYPES[dtype]
    worker = f"Batch<{element}, {cols}, {STAGES}, {_list(kinds)}>"
    return _entry("batch", worker, "BatchArgs", "256, 1")


def dequantize(dtype: torch.dtype, kinds: Sequence[Kind]) -> str:
    """The dequantizing kernel to a type of 16 bits."""
    worker = f"Dequantize<{TYPES[dtype]}, {_list(kinds)}>"
    return _entry("dequantize", worker, "DequantizeArgs", "256")


def _list(kinds: Sequence[Kind]) -> str:
    return ", ".join(f"Kind<{bits}, {groups}, {int(zero)}>" for bits, groups, zero in kinds)


def _entry(header: str, worker: str, structure: str, bounds: str) -> str:
    return (
        f'#include "{header}.cuh"\n'
        f'extern "C" __global__ void __launch_bounds__({bounds})\n'
        f"entry(const __grid_constant__ {structure} args) {{ {worker}{{args}}.run(); }}\n"
    )
