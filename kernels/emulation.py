"""The device source as a host program: a thread for every CUDA thread.

`cuda/host.h` says what stands for what. A program runs many cases of kernels, read from a file; it
is built by g++ in a few seconds, with sanitizers where wanted.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitsearch.kernels import entries
from bitsearch.kernels.batch_partition import batch_partition
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.nvrtc import SOURCES
from bitsearch.kernels.partition import Tuning, partition
from bitsearch.kernels.random_planes import Part

TUNING = Tuning(warps=4, stages=3)  # as in cases.h
# One kind of each width, as a program built with FEW_KINDS has them.
FEW: list[Part] = [
    (37, 1, 128, True),
    (16, 2, 64, True),
    (20, 3, 32, False),
    (33, 4, None, True),
    (5, 5, 128, True),
    (18, 6, 64, False),
    (40, 7, 32, True),
    (16, 8, None, True),
]


@dataclass(frozen=True)
class Case:
    """A kernel's name, its integers, and its arrays; the last is the output."""

    name: str
    numbers: Sequence[int]
    arrays: Sequence[Tensor]


@dataclass(frozen=True)
class Emulator:
    """Runs cases in one process of a built program."""

    program: Path
    folder: Path

    def __call__(self, cases: Sequence[Case], timeout: float = 300) -> list[Tensor]:
        """The output of each case.

        Raises:
            RuntimeError: the program failed; the message is what it wrote.
            TimeoutError: it did not end, as after a barrier that not all reach.
        """
        given, got = self.folder / "cases", self.folder / "outputs"
        with given.open("wb") as file:
            file.write(struct.pack("<q", len(cases)))
            for case in cases:
                name = case.name.encode()
                file.write(struct.pack("<q", len(name)) + name)
                file.write(
                    struct.pack(f"<{1 + len(case.numbers)}q", len(case.numbers), *case.numbers)
                )
                file.write(struct.pack("<q", len(case.arrays)))
                for array in case.arrays:
                    raw = array.contiguous().view(torch.uint8).numpy().tobytes()
                    file.write(struct.pack("<q", len(raw)) + raw)
        try:
            result = subprocess.run(
                [self.program, given, got], capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"no end after {timeout} s") from error
        if result.returncode:
            raise RuntimeError(f"exit {result.returncode}\n{result.stderr[-3000:]}")
        raw, start, outputs = got.read_bytes(), 0, []
        for case in cases:
            last = case.arrays[-1]
            part = np.frombuffer(raw, np.uint8, last.nbytes, start).copy()
            outputs.append(torch.from_numpy(part).view(last.dtype).view(last.shape))
            start += last.nbytes
        return outputs


def build(compiler: str, folder: Path, *flags: str, source: Path = SOURCES) -> Emulator:
    """Compile the host program.

    Args:
        compiler: of C++20, such as g++.
        folder: where the program and its files go.
        flags: such as -O1 or -fsanitize=address.
        source: the CUDA headers.

    Raises:
        CalledProcessError: it does not compile.
    """
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{source}", str(source / "emulate.cpp"), "-o", str(folder / "emulate")]
    subprocess.run([*command, "-lpthread"], check=True, capture_output=True, text=True)
    return Emulator(folder / "emulate", folder)


def stream_case(
    weight: Fused,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    processors: int = 3,
    shared_limit: int = 200_000,
    backwards: bool = False,
) -> Case:
    """The streaming kernel on a whole matrix, its output and memory poisoned."""
    m, columns = x.shape
    plan = partition(weight.shapes, m, processors, shared_limit, TUNING)
    blocks = sum(shape.blocks for shape in weight.shapes)
    workers = len(plan.plan)
    order = torch.arange(workers)
    partial = blocks * plan.splits * 16 * m if plan.splits > 1 else 0
    numbers = [m, columns, x.stride(0), weight.rows, weight.shapes[0].tiles, plan.splits]
    numbers += [plan.slot_bytes, plan.capacity, plan.shared_bytes]
    arrays = [
        order.flip(0) if backwards else order,
        x,
        weight.data,
        _table(weight),
        torch.from_numpy(plan.plan),
        torch.empty(0, dtype=x.dtype) if bias is None else bias,
        torch.full((partial,), torch.nan),
        torch.zeros(blocks, dtype=torch.int32),
        torch.full((m, weight.rows), torch.nan, dtype=x.dtype),
    ]
    return Case(f"stream {_short(x.dtype)} {1 if m <= 8 else 2}", numbers, arrays)


def batch_case(
    weight: Fused,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    processors: int = 3,
) -> Case:
    """The batch kernel on a whole matrix, its output and memory poisoned.

    Args:
        weight: the matrix.
        x: (m, columns), 16-bit, or bytes of `tokens.cuh`.
        bias: (rows,) or None.
        scales: (m,) of bytes.
        dtype: of the output, if x is bytes.
        processors: of the device that the launch is made for.
    """
    m, columns = x.shape
    dtype = dtype or x.dtype
    plan = batch_partition(weight.shapes, m, processors)
    numbers = [m, columns, x.stride(0), weight.rows, weight.shapes[0].tiles, plan.splits]
    numbers += [plan.slot_bytes, plan.row_tiles, plan.shared_bytes]
    arrays = [
        torch.arange(plan.grid),
        x,
        weight.data,
        _table(weight),
        torch.from_numpy(plan.plan),
        torch.empty(0, dtype=dtype) if bias is None else bias,
        torch.full((plan.grid * plan.values if plan.splits > 1 else 0,), torch.nan),
        torch.zeros(plan.row_tiles * plan.column_tiles, dtype=torch.int32),
        torch.empty(0) if scales is None else scales,
        torch.full((m, weight.rows), torch.nan, dtype=dtype),
    ]
    kernel = "batch" if scales is None else "bytes"
    return Case(f"{kernel} {_short(dtype)} {plan.cols}", numbers, arrays)


def token_case(x: Tensor) -> Case:
    """Rows of x to bytes; the output is the bytes, in columns rounded up to sixteen."""
    m, columns = x.shape
    stride = -(-columns // 16) * 16
    out = torch.full((m, stride), 77, dtype=torch.int8)
    arrays = [torch.arange(m), x, torch.full((m,), torch.nan), out]
    return Case(f"tokens {_short(x.dtype)}", [columns, x.stride(0), stride], arrays)


def dequantize_case(weight: Fused, dtype: torch.dtype) -> Case:
    """The dequantizing kernel on a whole matrix, its output poisoned."""
    blocks = sum(shape.blocks for shape in weight.shapes)
    numbers = [weight.columns, weight.shapes[0].tiles, blocks, len(weight.shapes)]
    out = torch.full((weight.rows, weight.columns), torch.nan, dtype=dtype)
    arrays = [torch.arange(3), weight.data, _table(weight), out]
    return Case(f"dequantize {_short(dtype)}", numbers, arrays)


def _table(weight: Fused) -> Tensor:
    return torch.frombuffer(bytearray(entries.segments(weight.shapes)), dtype=torch.uint8)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
