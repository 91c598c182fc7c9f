"""A fused matrix in device form: segments of rows, each of its own width and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.kernels.planes import Planes, Shape, dequantize

MAX_SEGMENTS = 8  # as in segments.cuh
_ALIGN = 256


@dataclass(frozen=True, slots=True)
class Fused:
    """Matrices of the same inputs, one below the other, for one launch.

    Attributes:
        shapes: of each segment, top to bottom.
        data: uint8, the segments one after another, each aligned to 256 bytes.
    """

    shapes: tuple[Shape, ...]
    data: Tensor

    @property
    def rows(self) -> int:
        """Output features of all segments."""
        return sum(shape.rows for shape in self.shapes)

    @property
    def columns(self) -> int:
        """Input features."""
        return self.shapes[0].columns

    @property
    def nbytes(self) -> int:
        """Bytes that a launch reads of it."""
        return sum(shape.nbytes for shape in self.shapes)

    def segments(self) -> list[Planes]:
        """Each segment by itself."""
        return [
            Planes(shape, self.data[start : start + shape.nbytes])
            for shape, start in zip(self.shapes, starts_of(self.shapes), strict=True)
        ]

    def dequantize(self) -> Tensor:
        """(rows, columns) float32."""
        return torch.cat([dequantize(planes) for planes in self.segments()])

    def to(self, device: torch.device | str) -> Fused:
        """The same matrix on another device."""
        return replace(self, data=self.data.to(device))


def fuse(parts: Sequence[Planes]) -> Fused:
    """Put matrices of the same inputs below one another.

    Raises:
        BadInput: their inputs differ, or they are too many for one launch.
    """
    shapes = tuple(part.shape for part in parts)
    if not 1 <= len(shapes) <= MAX_SEGMENTS:
        raise BadInput(f"{len(shapes)} matrices in one launch; 1 to {MAX_SEGMENTS} fit")
    if len({shape.columns for shape in shapes}) > 1:
        columns = ", ".join(str(shape.columns) for shape in shapes)
        raise BadInput(f"matrices of {columns} columns cannot share a launch")
    starts = starts_of(shapes)
    device = parts[0].data.device
    data = torch.zeros(starts[-1] + shapes[-1].nbytes, dtype=torch.uint8, device=device)
    for part, start in zip(parts, starts, strict=True):
        data[start : start + part.data.numel()] = part.data
    return Fused(shapes, data)


def starts_of(shapes: Sequence[Shape]) -> list[int]:
    """First byte of each segment."""
    starts, next_start = [], 0
    for shape in shapes:
        starts.append(next_start)
        next_start += -(-shape.nbytes // _ALIGN) * _ALIGN
    return starts
