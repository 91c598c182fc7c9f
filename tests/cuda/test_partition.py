"""Who reads what: every tile by one block, and room for it on devices of any size."""

from __future__ import annotations

from collections import Counter

import pytest

from bitsearch.kernels.launches import tuning_of
from bitsearch.kernels.partition import Tuning, fitting, partition
from bitsearch.kernels.planes import Shape

LARGE, SMALL = 228 << 10, 100 << 10  # shared memory of a multiprocessor: H100; RTX 30, 40, 50
MIXED = (Shape(3, 64, False, 300, 4096), Shape(8, 0, True, 40, 4096), Shape(5, 128, True, 16, 4096))


@pytest.mark.parametrize("processors", [1, 2, 7, 132])
@pytest.mark.parametrize("m", [1, 9, 16])
def test_every_range_of_every_block_of_rows_is_one_workers(processors: int, m: int) -> None:
    found = partition(MIXED, m, processors, LARGE, Tuning(4, 3))
    assert 1 <= found.splits <= len(found.plan) <= processors
    dealt = Counter(
        (worker % found.splits, int(item))
        for worker, (count, *items) in enumerate(found.plan)
        for item in items[:count]
    )
    wanted = {
        (split, segment << 24 | block)
        for split in range(found.splits)
        for segment, shape in enumerate(MIXED)
        for block in range(shape.blocks)
    }
    assert set(dealt) == wanted
    assert set(dealt.values()) == {1}


@pytest.mark.parametrize("columns", [640, 4096, 14336])
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_has_room_on_a_small_device(bits: int, m: int, columns: int) -> None:
    shapes = (Shape(bits, 32, False, 4096, columns),)
    how = fitting(shapes, m, 30, SMALL, tuning_of(shapes, m))
    assert partition(shapes, m, 30, SMALL, how).shared_bytes <= SMALL - 1024


def test_where_there_is_room_the_tuning_stays() -> None:
    shapes = (Shape(4, 128, True, 4096, 4096),)
    assert fitting(shapes, 1, 132, LARGE, tuning_of(shapes, 1)) == tuning_of(shapes, 1)
