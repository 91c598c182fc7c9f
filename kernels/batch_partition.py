"""The launch of the batch kernel: which rows each warp makes, and how columns are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsearch.kernels.partition import lane_bytes
from bitsearch.kernels.planes import Shape

WARPS, ROWS, X_PITCH, STAGES = 8, 32, 320, 3  # as in batch.cuh; ROWS of W of a warp
_NONE = -1
# Tiles of 128 columns that fit into the time of what a block does besides, and where ranges meet.
_BLOCK_COST, _SPLIT_COST = 3.0, 6.0


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """A launch of the batch kernel.

    Attributes:
        plan: (row tiles, 8): segment << 24 | first block of 16 rows; -1: none.
        column_tiles: tiles of 8·cols rows of x.
        cols: units of 8 rows of x in a tile, 4 or 8.
        splits: ranges of columns.
        slot_bytes: of one warp's stage of the ring.
        shared_bytes: dynamic shared memory of a block.
    """

    plan: NDArray[np.int32]
    column_tiles: int
    cols: int
    splits: int
    slot_bytes: int
    shared_bytes: int

    @property
    def row_tiles(self) -> int:
        """Tiles of 256 rows of W."""
        return len(self.plan)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return self.row_tiles * self.column_tiles * self.splits

    @property
    def values(self) -> int:
        """Sums of a tile."""
        return WARPS * ROWS * 8 * self.cols


def batch_partition(shapes: Sequence[Shape], m: int, processors: int) -> BatchPartition:
    """Split columns so far that all multiprocessors have work, and no further.

    Args:
        shapes: segments of the fused matrix.
        m: rows of x.
        processors: multiprocessors of the device.
    """
    pairs = [
        segment << 24 | block
        for segment, shape in enumerate(shapes)
        for block in range(0, shape.blocks, 2)
    ]
    row_tiles = -(-len(pairs) // WARPS)
    plan = np.full(row_tiles * WARPS, _NONE, np.int32)
    plan[: len(pairs)] = pairs
    # With several groups a tile, sums of 64 rows of x do not fit into a thread's registers.
    cols = 4 if m <= 32 or any(shape.groups > 1 for shape in shapes) else 8
    column_tiles = -(-m // (8 * cols))
    tiles = shapes[0].tiles

    def cost(splits: int) -> float:
        waves = -(-row_tiles * column_tiles * splits // processors)
        extra = _BLOCK_COST + (_SPLIT_COST if splits > 1 else 0)
        return waves * (-(-tiles // splits) + extra)

    slot = 2 * max(lane_bytes(shape) for shape in shapes)
    return BatchPartition(
        plan=plan.reshape(row_tiles, WARPS),
        column_tiles=column_tiles,
        cols=cols,
        splits=min(range(1, min(tiles, 16) + 1), key=cost),
        slot_bytes=slot,
        shared_bytes=STAGES * (8 * cols * X_PITCH + WARPS * slot),
    )
