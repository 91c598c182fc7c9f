"""The product with a fused matrix in Triton: a second implementation of the same operation.

It reads the same bytes as the CUDA kernels and shares no code with them: planes are taken apart
by plain shifts, one program a block of 16 rows. It runs on whatever Triton compiles for, and in
its interpreter on a processor (`TRITON_INTERPRET=1`), where it is compared with the reference.
It is not tuned, and no faster than it need be.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.planes import COLUMNS, LANES, PAIRS, PLANES, ROWS, Planes

tl: Any = None  # triton.language, where a kernel looks it up


def matmul(x: Tensor, weight: Fused) -> Tensor:
    """x·Wᵀ in the type of x, with float32 sums.

    Args:
        x: (m, columns) of a float type; in the interpreter on a processor.
        weight: the fused matrix, on the device of x.

    Raises:
        BadInput: shapes do not match, or Triton is not installed.
    """
    if x.shape[-1] != weight.columns:
        raise BadInput(f"inputs have {x.shape[-1]} features, the weight {weight.columns}")
    x = x.contiguous()
    parts = []
    for segment in weight.segments():
        out = x.new_empty(len(x), segment.shape.rows)
        _launch(x, segment, out)
        parts.append(out)
    return torch.cat(parts, dim=1)


def _launch(x: Tensor, segment: Planes, out: Tensor) -> None:
    shape = segment.shape
    words, places = _tables(shape.bits, str(x.device))
    _product()[(shape.blocks,)](
        x,
        segment.data,
        words,
        places,
        out,
        len(x),
        shape.columns,
        shape.rows,
        shape.tiles,
        shape.block_bytes,
        shape.tile_bytes,
        BITS=shape.bits,
        PLANES=len(PLANES[shape.bits]),
        GROUPS=shape.groups,
        ROWWISE=shape.group == 0,
        SYMMETRIC=shape.symmetric,
        M=max(16, 1 << (len(x) - 1).bit_length()),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )


def _tables(bits: int, device: str) -> tuple[Tensor, Tensor]:
    """Where the code of row r and column k of a tile lies, plane by plane.

    Returns:
        words: (planes, 16, 128) int32, the byte in the tile where its 32-bit word begins.
        places: (planes, 16, 128, 3) int32: lowest bit of its field in the word (modulo 32),
            width, and where it goes in the code.
    """
    row = torch.arange(ROWS)[:, None]
    column = torch.arange(COLUMNS)[None, :]
    lane = row % 8 * 4 + column % 32 // 8
    inside = column % 8
    pair = column // 32 * 8 + inside // 4 * 4 + inside % 4 // 2 * 2 + row // 8
    half = inside % 2
    words, places, start = [], [], 0
    for plane in PLANES[bits]:
        assert plane.words * plane.fields == PAIRS
        number = pair // plane.fields
        piece = min(plane.words, 4)
        at = start + (number // piece * LANES + lane) * 4 * piece + number % piece * 4
        offsets = torch.tensor([plane.offset(field) for field in range(PAIRS)])
        low = (offsets[pair] + 16 * half) % 32
        words.append(at)
        width = torch.full_like(at, plane.width)
        places.append(torch.stack([low, width, torch.full_like(at, plane.base)], dim=-1))
        start += 4 * LANES * plane.words
    return (
        torch.stack(words).int().to(device).contiguous(),
        torch.stack(places).int().to(device).contiguous(),
    )


@cache
def _product() -> Any:
    """The kernel; Triton is imported when it is first wanted."""
    global tl
    try:
        triton = import_module("triton")
        tl = import_module("triton.language")
    except ImportError as error:
        raise BadInput("Triton is not installed: pip install 'bitsearch[triton]'") from error

    @triton.jit  # type: ignore[untyped-decorator]
    def product(  # type: ignore[no-untyped-def]
        x,
        data,
        words,
        places,
        out,
        m,
        columns,
        rows,
        tiles,
        block_bytes,
        tile_bytes,
        BITS: tl.constexpr,
        PLANES: tl.constexpr,
        GROUPS: tl.constexpr,
        ROWWISE: tl.constexpr,
        SYMMETRIC: tl.constexpr,
        M: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        number = tl.program_id(0)
        row = tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        token = tl.arange(0, M)
        block = data + number.to(tl.int64) * block_bytes
        sums = tl.zeros((M, ROWS), tl.float32)
        place = row[:, None] * COLUMNS + column[None, :]
        for tile in range(tiles):
            start = block + tile * tile_bytes
            codes = tl.zeros((ROWS, COLUMNS), tl.int32)
            for plane in tl.static_range(PLANES):
                at = tl.load(words + plane * ROWS * COLUMNS + place)
                word = tl.zeros((ROWS, COLUMNS), tl.int64)
                for byte in tl.static_range(4):
                    word |= tl.load(start + at + byte).to(tl.int64) << (8 * byte)
                field = places + (plane * ROWS * COLUMNS + place) * 3
                low, width, base = tl.load(field), tl.load(field + 1), tl.load(field + 2)
                twice = word | (word << 32)
                value = (twice >> low.to(tl.int64)).to(tl.int32) & ((1 << width) - 1)
                codes |= value << base
            meta = block + tiles * tile_bytes if ROWWISE else start + 256 * BITS
            group = column // (COLUMNS // GROUPS)
            # [g][group][rows g, g+8]
            entry = (row[:, None] % 8 * GROUPS + group[None, :]) * 2 + row[:, None] // 8
            bits = tl.load(meta + 2 * entry).to(tl.int16) | (
                tl.load(meta + 2 * entry + 1).to(tl.int16) << 8
            )
            scales = bits.to(tl.float16, bitcast=True).to(tl.float32)
            if SYMMETRIC:
                zeros = tl.full((ROWS, COLUMNS), 1 << (BITS - 1), tl.int32)
            else:
                slots: tl.constexpr = 2 if GROUPS == 1 else GROUPS
                zero = (row[:, None] % 8 * slots + group[None, :]) * 2 + row[:, None] // 8
                zeros = tl.load(meta + 32 * GROUPS + zero).to(tl.int32)
            weights = (codes - zeros).to(tl.float32) * scales
            from_ = tile * COLUMNS + column
            inside = (token[:, None] < m) & (from_[None, :] < columns)
            left = tl.load(x + token[:, None] * columns + from_[None, :], mask=inside, other=0.0)
            sums += tl.dot(left.to(tl.float32), tl.trans(weights), input_precision="ieee")
        to = number * ROWS + row
        where = out + token[:, None] * rows + to[None, :]
        tl.store(
            where, sums.to(out.dtype.element_ty), mask=(token[:, None] < m) & (to[None, :] < rows)
        )

    return product
