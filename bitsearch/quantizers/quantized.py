"""A quantized matrix: codes with their scales and zero points, and its bytes.

The packed form is what `Format.bytes` counts. Rounding scales to float16
happens before codes are chosen, so the packed tensor decodes to exactly the
values that were measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsearch.formats import Format

_PIECE = 1 << 22  # codes packed at a time


@dataclass(frozen=True, slots=True)
class Quantized:
    """Integer codes of an (out, in) matrix with `groups` groups in a row.

    Attributes:
        format: the integer format.
        codes: (out, in) uint8, in [0, 2^bits).
        scales: (out, groups) float16.
        zeros: (out, groups) uint8; for a symmetric format all 2^(bits-1).
    """

    format: Format
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32: scale · (code − zero)."""
        columns = self.codes.shape[1]
        size = self.format.group_size or columns
        values = self.codes.float()
        full = columns - columns % size
        scales, zeros = self.scales.float()[..., None], self.zeros.float()[..., None]
        groups = values[:, :full].unflatten(1, (full // size, size))
        groups.sub_(zeros[:, : full // size]).mul_(scales[:, : full // size])
        if full < columns:
            values[:, full:].sub_(zeros[:, -1]).mul_(scales[:, -1])
        return values

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        bits = self.format.bits
        packed = {
            "codes": torch.from_numpy(pack_rows(self.codes.cpu().numpy(), bits)),
            "scales": self.scales.cpu().contiguous(),
        }
        if not self.format.symmetric:
            packed["zeros"] = torch.from_numpy(pack_rows(self.zeros.cpu().numpy(), bits))
        return packed


def unpack(packed: dict[str, Tensor], format: Format, in_features: int) -> Quantized:
    """The inverse of `Quantized.pack` for a matrix of `in_features` columns."""
    groups = format.groups(in_features)
    scales = packed["scales"]
    if format.symmetric:
        zeros = torch.full(scales.shape, 2 ** (format.bits - 1), dtype=torch.uint8)
    else:
        zeros = torch.from_numpy(unpack_rows(packed["zeros"].numpy(), format.bits, groups))
    codes = torch.from_numpy(unpack_rows(packed["codes"].numpy(), format.bits, in_features))
    return Quantized(format, codes, scales, zeros)


def pack_rows(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows, n) codes below 2^bits -> (rows, ceil(n·bits/8)) bytes, low bit first."""

    def pack(some: NDArray[np.uint8]) -> NDArray[np.uint8]:
        planes = np.unpackbits(some[:, :, None], axis=2, count=bits, bitorder="little")
        return np.packbits(planes.reshape(len(some), -1), axis=1, bitorder="little")

    return _in_pieces(pack, values, values.shape[1])


def unpack_rows(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """The inverse of `pack_rows`: (rows, columns) codes."""

    def unpack(some: NDArray[np.uint8]) -> NDArray[np.uint8]:
        flat = np.unpackbits(some, axis=1, count=columns * bits, bitorder="little")
        planes = flat.reshape(len(some), columns, bits)
        return np.packbits(planes, axis=2, bitorder="little")[:, :, 0]

    return _in_pieces(unpack, packed, columns)


def _in_pieces(
    work: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    rows: NDArray[np.uint8],
    columns: int,
) -> NDArray[np.uint8]:
    """Some rows at a time: a bit takes a byte on the way."""
    step = max(1, _PIECE // max(1, columns))
    if len(rows) <= step:
        return work(rows)
    return np.concatenate([work(rows[at : at + step]) for at in range(0, len(rows), step)])
