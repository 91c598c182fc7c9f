"""Times launches by replaying them as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Replay:
    """Some launches as a graph, replayed between two events.

    Args:
        launches: each only launches kernels; they run once before they are captured.
    """

    def __init__(self, launches: Sequence[Callable[[], object]]) -> None:
        self._launches: Sequence[Callable[[], object]] = (
            launches  # the graph reads the memory that they hold
        )
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=stream):
            for launch in launches:
                launch()
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self, replays: int = 1) -> float:
        """Nanoseconds a launch, over some replays."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return 1e6 * milliseconds / (replays * len(self._launches))

    def close(self) -> None:
        """Free the graph and its memory."""
        self._graph.reset()
        self._launches = ()
