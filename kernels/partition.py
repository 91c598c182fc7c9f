"""Who reads which bytes: the items of each block of the streaming kernel."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import BadInput
from bitsearch.kernels.planes import COLUMNS, ROWS, Shape

_PIECE_BYTES = 20 * 4  # sums of an item, of one row of x: PIECE_PITCH floats of stream.cuh
# Bytes read in the time that an item takes besides, and where ranges of columns meet.
_ITEM_COST, _SPLIT_COST = 256, 2048


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the streaming kernel is built.

    Attributes:
        warps: warps of a block.
        stages: tiles that each warp has under way.
        resident: blocks that a multiprocessor holds at once.
    """

    warps: int = 16
    stages: int = 4
    resident: int = 1


@dataclass(frozen=True, slots=True)
class Partition:
    """A launch of the streaming kernel.

    Attributes:
        plan: (blocks, 1 + capacity): how many items, and each, segment << 24 | 16 rows.
        splits: ranges of columns; block c works on range c mod splits.
        slot_bytes: of one stage of the ring.
        capacity: most items of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    plan: NDArray[np.int32]
    splits: int
    slot_bytes: int
    capacity: int
    shared_bytes: int


def partition(
    shapes: Sequence[Shape], m: int, processors: int, shared_limit: int, tuning: Tuning
) -> Partition:
    """Give every block of threads about the same bytes.

    Columns are split where x would not fit into shared memory, or where rows alone leave
    multiprocessors idle. Items are dealt out longest first, each to the block with least.

    Args:
        shapes: segments of the fused matrix.
        m: rows of x, 1 to 16.
        processors: multiprocessors of the device.
        shared_limit: bytes of shared memory that one multiprocessor gives blocks.
        tuning: how the kernel is built.

    Raises:
        BadInput: x does not fit into shared memory however it is split.
    """
    tiles = shapes[0].tiles
    workers = processors * tuning.resident
    blocks = sum(shape.blocks for shape in shapes)
    # A ring must have room for the sums of an item.
    piece = -(-_PIECE_BYTES * m // tuning.stages // 16) * 16
    slot = max(piece, *(lane_bytes(shape) for shape in shapes))
    limit = shared_limit // tuning.resident - 1024
    mean = sum(shape.nbytes for shape in shapes) / (blocks * tiles)
    best: tuple[float, int] | None = None
    for splits in range(1, min(tiles, workers) + 1):
        most = -(-blocks // max(1, min(workers, blocks * splits) // splits))
        if _shared_bytes(m, tiles, splits, slot, 2 * most + 8, tuning) > limit:
            continue
        cost = most * (-(-tiles // splits) * mean + (_ITEM_COST if splits == 1 else _SPLIT_COST))
        if best is None or cost < best[0]:
            best = cost, splits
        if tiles < 2 * splits * tuning.warps:
            break
    if best is None:
        raise BadInput(f"{m} rows of {tiles * COLUMNS} columns do not fit into shared memory")
    splits = best[1]
    count = min(workers, blocks * splits)
    dealt: list[list[int]] = [[] for _ in range(count)]
    for split in range(splits):
        length = tiles * (split + 1) // splits - tiles * split // splits
        heap = [(0, worker) for worker in range(split, count, splits)]
        work = [
            (length * shape.tile_bytes + _ITEM_COST, segment << 24 | block)
            for segment, shape in enumerate(shapes)
            for block in range(shape.blocks)
        ]
        work.sort(key=lambda entry: -entry[0])
        for cost, item in work:
            load, worker = heapq.heappop(heap)
            dealt[worker].append(item)
            heapq.heappush(heap, (load + cost, worker))
    capacity = max(len(items) for items in dealt)
    plan = np.zeros((count, 1 + capacity), np.int32)
    for worker, items in enumerate(dealt):
        plan[worker, 0] = len(items)
        plan[worker, 1 : 1 + len(items)] = sorted(items)
    return Partition(
        plan=plan,
        splits=splits,
        slot_bytes=slot,
        capacity=capacity,
        shared_bytes=_shared_bytes(m, tiles, splits, slot, capacity, tuning),
    )


def fitting(
    shapes: Sequence[Shape], m: int, processors: int, shared_limit: int, tuning: Tuning
) -> Tuning:
    """The tuning, or the largest smaller one that the device's shared memory has room for.

    Args:
        shapes: segments of the fused matrix.
        m: rows of x, 1 to 16.
        processors: multiprocessors of the device.
        shared_limit: bytes of shared memory that one multiprocessor gives blocks.
        tuning: how the kernel is best built where there is room.

    """
    for smaller in (tuning, Tuning(16, 3), Tuning(12, 3), Tuning(8, 3), Tuning(8, 2)):
        try:
            partition(shapes, m, processors, shared_limit, smaller)
        except BadInput:
            continue
        return smaller
    return Tuning(4, 2)


def lane_bytes(shape: Shape) -> int:
    """Shared memory of a tile: planes, and each lane's copies of its scales and zero points."""
    zeros = 0 if shape.symmetric else 32 * (8 if shape.groups == 4 else 4)
    return ROWS * COLUMNS * shape.bits // 8 + 128 * shape.groups + zeros


def _shared_bytes(m: int, tiles: int, splits: int, slot: int, capacity: int, tuning: Tuning) -> int:
    items = _align(4 * (2 * capacity + 4))
    heads = _align(tuning.warps * _PIECE_BYTES * m)
    ring = tuning.warps * tuning.stages * slot
    return items + heads + ring + m * (-(-tiles // splits) * 2 * COLUMNS + 64)


def _align(size: int) -> int:
    return -(-size // 128) * 128
