"""Device form of integer matrices: bit planes in the order in which matrix units read them.

A code of 1 to 8 bits is cut into planes of 4, 2 and 1 bits (8 bits are one plane): 3 = 2+1,
5 = 4+1, 6 = 4+2, 7 = 4+2+1, low bits first. The matrix is cut into tiles of 16 rows and 128
columns. In a tile, lane (g, t) of a warp (lane = 4·g + t) owns rows g and g+8 and, of every
32 columns, eight neighbours beginning at 8·t: exactly what it feeds to `mma.m16n8k16` as its
rows of A, when the columns of an activation row are read 16 bytes at a time as B.

Its 64 codes are 32 pairs of neighbouring columns, numbered h = 8·unit + 4·step + register, and a
pair is two fields of one 32-bit word, the same place in its lower and upper half. `offset` says
where: fields that a decoder can use together lie so that one rotation serves all of them.

A tile is, in this order: each plane as 16-byte pieces [piece][lane] (the plane of single bits in
8-byte pieces), the float16 scales [g][group][rows g, g+8], and for asymmetric matrices the zero
points [g][group][rows g, g+8] as bytes, a lone group written twice. Sixteen rows are one block: its
tiles one after another; where a whole row has one scale, the scales and zero points follow the
last tile in place of each tile. Rows and columns are padded with zero bytes to whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.quantizers.quantized import Quantized

ROWS, COLUMNS, LANES, PAIRS = 16, 128, 32, 32
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a width, and where its fields lie.

    Attributes:
        width: bits of a field: 1, 2, 4 or 8.
        base: the bit of the code that is the field's lowest.
        count: fields that lie `step` bits apart, before the next ones fill the gaps.
        step: see `count`.
    """

    width: int
    base: int
    count: int
    step: int

    @property
    def fields(self) -> int:
        """Fields in half a word."""
        return 16 // self.width

    @property
    def words(self) -> int:
        """Words of a lane in a tile."""
        return 2 * self.width

    def offset(self, pair: int) -> int:
        """Lowest bit, modulo 32, of the lower field of a pair; the upper one is 16 bits on."""
        index = pair % self.fields
        turn, gaps = index // self.count, self.step // self.width
        place = self.base + self.step * (index % self.count) + self.width * (turn % gaps)
        return (place + self.count * self.step * (turn // gaps)) % 32


PLANES: dict[int, tuple[Plane, ...]] = {
    1: (Plane(1, 0, 8, 1),),
    2: (Plane(2, 0, 4, 2),),
    3: (Plane(2, 0, 4, 2), Plane(1, 2, 4, 2)),
    4: (Plane(4, 0, 2, 4),),
    5: (Plane(4, 0, 2, 4), Plane(1, 4, 2, 4)),
    6: (Plane(4, 0, 2, 4), Plane(2, 4, 2, 4)),
    7: (Plane(4, 0, 1, 16), Plane(2, 4, 1, 16), Plane(1, 6, 1, 16)),
    8: (Plane(8, 0, 1, 16),),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that decides where the bytes of a matrix lie.

    Attributes:
        bits: code width, 1 to 8.
        group: columns of a scale: 32, 64, 128, or 0 for a whole row.
        symmetric: zero points are all 2^(bits−1) and not stored.
        rows: output features.
        columns: input features.
    """

    bits: int
    group: int
    symmetric: bool
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return -(-self.rows // ROWS)

    @property
    def tiles(self) -> int:
        """Tiles of 128 columns in a block."""
        return -(-self.columns // COLUMNS)

    @property
    def groups(self) -> int:
        """Scales of a row that lie in one tile."""
        return COLUMNS // self.group if self.group else 1

    @property
    def row_groups(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.group) if self.group else 1

    @property
    def meta_bytes(self) -> int:
        """Bytes of 16 rows' scales and zero points over `groups` groups."""
        zeros = 0 if self.symmetric else ROWS * max(2, self.groups)
        return 2 * ROWS * self.groups + zeros

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return ROWS * COLUMNS * self.bits // 8 + (self.meta_bytes if self.group else 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.tiles * self.tile_bytes + (0 if self.group else self.meta_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in device form."""
        return self.blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix in device form.

    Attributes:
        shape: where its bytes lie.
        data: (shape.nbytes,) uint8.
    """

    shape: Shape
    data: Tensor

    def to(self, device: torch.device | str) -> Planes:
        """The same matrix on another device."""
        return replace(self, data=self.data.to(device))


def device_group(size: int | None, columns: int) -> int:
    """The group of the device form that holds groups of `size` columns: 32, 64, 128, or 0.

    A larger group is written as several with equal scales.

    Raises:
        BadInput: no group of the device form divides it.
    """
    if size is None or size >= columns:
        return 0
    for group in reversed(GROUPS):
        if size % group == 0:
            return group
    raise BadInput(f"groups of {size} columns have no kernel; use a multiple of 32, or row")


def pack(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int | None, symmetric: bool
) -> Planes:
    """Write a quantized matrix in device form, on the device of its codes.

    Args:
        codes: (out, in) uint8, below 2^bits.
        scales: (out, groups) float16.
        zeros: (out, groups) uint8; not read where symmetric.
        bits: 1 to 8.
        size: columns of a group, None for a whole row; the last may be shorter.
        symmetric: all zero points are 2^(bits−1).

    Raises:
        BadInput: the kernels have no such group.
    """
    rows, columns = codes.shape
    shape = Shape(bits, device_group(size, columns), symmetric, rows, columns)
    padded = torch.zeros(
        shape.blocks * ROWS, shape.tiles * COLUMNS, dtype=torch.uint8, device=codes.device
    )
    padded[:rows, :columns] = codes
    pairs = (
        padded.view(shape.blocks, 2, 8, shape.tiles, 4, 4, 2, 2, 2)
        .permute(0, 3, 2, 5, 4, 6, 7, 1, 8)
        .reshape(shape.blocks, shape.tiles, LANES, PAIRS, 2)
    )
    parts = [_pieces(_pack_plane(pairs, plane), plane) for plane in PLANES[bits]]
    meta = _pack_meta(scales, zeros, size, shape)
    if shape.group:
        parts.append(meta)
        data = torch.cat(parts, dim=2)
    else:
        data = torch.cat([torch.cat(parts, dim=2).flatten(1), meta.flatten(1)], dim=1)
    return Planes(shape, data.flatten())


def of_quantized(quantized: Quantized) -> Planes:
    """An integer matrix of ours in device form.

    Raises:
        BadInput: the kernels have no such group.
    """
    format = quantized.format
    return pack(
        quantized.codes,
        quantized.scales,
        quantized.zeros,
        format.bits,
        format.group_size,
        format.symmetric,
    )


def unpack(planes: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: codes (out, in), scales and zero points (out, groups)."""
    shape = planes.shape
    blocks = planes.data.view(shape.blocks, shape.block_bytes)
    if shape.group:
        tiles = blocks.view(shape.blocks, shape.tiles, shape.tile_bytes)
        meta = tiles[:, :, shape.tile_bytes - shape.meta_bytes :]
    else:
        inside = shape.tiles * shape.tile_bytes
        tiles = blocks[:, :inside].view(shape.blocks, shape.tiles, shape.tile_bytes)
        meta = blocks[:, None, inside:]
    pairs = torch.zeros(
        shape.blocks, shape.tiles, LANES, PAIRS, 2, dtype=torch.uint8, device=planes.data.device
    )
    start = 0
    for plane in PLANES[shape.bits]:
        end = start + 4 * LANES * plane.words
        _unpack_plane(tiles[:, :, start:end], plane, pairs)
        start = end
    codes = (
        pairs.view(shape.blocks, shape.tiles, 8, 4, 4, 2, 2, 2, 2)
        .permute(0, 7, 2, 1, 4, 3, 5, 6, 8)
        .reshape(shape.blocks * ROWS, shape.tiles * COLUMNS)
    )
    scales, zeros = _unpack_meta(meta, shape)
    return codes[: shape.rows, : shape.columns].contiguous(), scales, zeros


def dequantize(planes: Planes) -> Tensor:
    """(out, in) float32: scale · (code − zero), the reference of every kernel."""
    codes, scales, zeros = unpack(planes)
    columns = planes.shape.columns
    size = planes.shape.group or columns
    scales, zeros = (
        part.float().repeat_interleave(size, dim=1)[:, :columns] for part in (scales, zeros)
    )
    return (codes.float() - zeros) * scales


def _pack_plane(pairs: Tensor, plane: Plane) -> Tensor:
    """(blocks, tiles, lanes, words) int64 words of one plane."""
    values = (pairs.long() >> plane.base) & ((1 << plane.width) - 1)
    grouped = values.unflatten(3, (plane.words, plane.fields))
    words = torch.zeros(grouped.shape[:4], dtype=torch.int64, device=pairs.device)
    for field in range(plane.fields):
        for half in range(2):
            place = (plane.offset(field) + 16 * half) % 32
            wide = grouped[..., field, half] << place
            words |= (wide & 0xFFFFFFFF) | (wide >> 32)
    return words


def _unpack_plane(pieces: Tensor, plane: Plane, pairs: Tensor) -> None:
    """Add the bits of one plane to the codes."""
    per_piece = min(plane.words, 4)
    words = (
        pieces.reshape(*pieces.shape[:2], plane.words // per_piece, LANES, per_piece, 4)
        .long()
        .mul(torch.tensor([1, 1 << 8, 1 << 16, 1 << 24], device=pieces.device))
        .sum(-1)
        .transpose(2, 3)
        .reshape(*pieces.shape[:2], LANES, plane.words)
    )
    twice = words | (words << 32)
    grouped = pairs.unflatten(3, (plane.words, plane.fields))
    for field in range(plane.fields):
        for half in range(2):
            value = (twice >> (plane.offset(field) + 16 * half) % 32) & ((1 << plane.width) - 1)
            grouped[..., field, half] |= (value << plane.base).to(torch.uint8)


def _pieces(words: Tensor, plane: Plane) -> Tensor:
    """(blocks, tiles, bytes): a lane's words in pieces of 16 bytes, [piece][lane]."""
    per_piece = min(plane.words, 4)
    return _bytes_of(words.unflatten(3, (-1, per_piece)).transpose(2, 3).flatten(2))


def _bytes_of(words: Tensor) -> Tensor:
    """int64 words below 2^32 as their four bytes, lowest first."""
    shifts = torch.arange(0, 32, 8, device=words.device)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8).flatten(-2)


def _spread(values: Tensor, size: int | None, shape: Shape) -> Tensor:
    """(out, groups) -> (blocks, tiles, 8, groups of a tile, 2), padded with zeros."""
    if shape.group and size is not None:
        values = values.repeat_interleave(size // shape.group, dim=1)
    tiles = shape.tiles if shape.group else 1
    padded = values.new_zeros(shape.blocks * ROWS, tiles * shape.groups)
    padded[: shape.rows, : shape.row_groups] = values[:, : shape.row_groups]
    return padded.view(shape.blocks, 2, 8, tiles, shape.groups).permute(0, 3, 2, 4, 1)


def _pack_meta(scales: Tensor, zeros: Tensor, size: int | None, shape: Shape) -> Tensor:
    """(blocks, tiles or 1, meta_bytes) uint8."""
    meta = _spread(scales.half(), size, shape).contiguous().view(torch.uint8).flatten(2)
    if shape.symmetric:
        return meta
    points = _spread(zeros, size, shape)
    if shape.groups == 1:
        points = points.expand(-1, -1, -1, 2, -1)
    return torch.cat([meta, points.flatten(2)], dim=2)


def _unpack_meta(meta: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """(out, groups) float16 scales and uint8 zero points."""
    wide = 2 * ROWS * shape.groups
    scales = meta[:, :, :wide].contiguous().view(torch.float16)
    if shape.symmetric:
        zeros = torch.full_like(scales, 2 ** (shape.bits - 1)).to(torch.uint8)
    else:
        points = meta[:, :, wide:].unflatten(2, (8, max(2, shape.groups), 2))
        zeros = points[:, :, :, : shape.groups].flatten(2)
    return _gather(scales, shape), _gather(zeros, shape)


def _gather(values: Tensor, shape: Shape) -> Tensor:
    """The inverse of `_spread` for groups of the device form."""
    tiles = values.shape[1]
    return (
        values.reshape(shape.blocks, tiles, 8, shape.groups, 2)
        .permute(0, 4, 2, 1, 3)
        .reshape(shape.blocks * ROWS, tiles * shape.groups)[: shape.rows, : shape.row_groups]
        .contiguous()
    )
