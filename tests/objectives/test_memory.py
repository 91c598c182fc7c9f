"""Mini-batches shrink when memory runs out, and only then."""

from __future__ import annotations

import pytest
import torch

from bitsearch.errors import OutOfResources
from bitsearch.objectives.memory import MiniBatches, available_bytes, is_out_of_memory


class Memory:
    """Work that fails for more than `limit` windows and records what it did."""

    def __init__(self, limit: int, error: Exception | None = None) -> None:
        self.limit = limit
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.done: list[tuple[int, int]] = []

    def __call__(self, part: slice) -> int:
        if part.stop - part.start > self.limit:
            raise self.error
        self.done.append((part.start, part.stop))
        return part.stop - part.start


@pytest.mark.parametrize("total", [1, 7, 8, 9])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_every_window_is_worked_on_once_in_order(total: int, limit: int, size: int) -> None:
    memory = Memory(limit)
    results = list(MiniBatches(size).map(total, memory))
    windows = [window for start, stop in memory.done for window in range(start, stop)]
    assert windows == list(range(total))
    assert sum(results) == total and max(results) <= min(limit, size)


def test_size_halves_and_stays_for_later_work() -> None:
    batches = MiniBatches(8)
    memory = Memory(3)
    list(batches.map(8, memory))
    assert memory.done == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert batches.size == 2


def test_short_last_slice_is_halved_itself() -> None:
    """Halving a size of 8 to 4 would not make a rest of 3 windows any smaller."""
    tries: list[int] = []

    def work(part: slice) -> None:
        tries.append(part.stop - part.start)
        if tries[-1] > 1:
            raise torch.OutOfMemoryError

    list(MiniBatches(8).map(3, work))
    assert tries == [3, 1, 1, 1]


def test_one_window_that_does_not_fit_is_out_of_resources() -> None:
    with pytest.raises(OutOfResources, match="--length"):
        list(MiniBatches(4).map(4, Memory(0)))


def test_rest_of_one_window_that_does_not_fit_is_out_of_resources() -> None:
    with pytest.raises(OutOfResources):
        list(MiniBatches(4).map(1, Memory(0)))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        list(MiniBatches(4).map(4, Memory(0, RuntimeError("shapes do not match"))))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_real_allocation_failure_is_recognised() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_host_memory_is_known() -> None:
    assert available_bytes(torch.device("cpu")) > 1 << 20
