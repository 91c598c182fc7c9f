"""How much memory there is, and work that shrinks its batch until it fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import torch

from bitsearch.errors import OutOfResources

T = TypeVar("T")
log = logging.getLogger(__name__)


def available_bytes(device: torch.device) -> int:
    """Free memory of a device (of the host for a CPU), in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "out of memory" in text or "ALLOC_FAILED" in text
    )


class MiniBatches:
    """Slices of `total` windows whose size halves whenever memory runs out.

    Args:
        size: windows of the first mini-batch.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)

    def map(self, total: int, work: Callable[[slice], T]) -> Iterator[T]:
        """`work` over consecutive slices of range(total).

        Raises:
            OutOfResources: a single window does not fit.
        """
        start = 0
        while start < total:
            part = slice(start, min(start + self.size, total))
            try:
                result = work(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # The last slice may hold fewer windows than the size.
                tried = min(self.size, part.stop - part.start)
                if tried == 1:
                    raise OutOfResources(
                        "one window of text does not fit into memory; use a shorter --length"
                    ) from error
                self.size = tried // 2
            else:
                yield result
                start = part.stop
                continue
            # Only now that the error is gone does its traceback hold no tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.warning("out of memory: going on with %d windows at a time", self.size)
