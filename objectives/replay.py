"""The KL of policies that resemble one another: only what differs is done again.

A search on the real loss measures many neighbours of one policy, its base. The
states that enter each block under the base are recorded; a neighbour swaps the
weights of the units in which it differs and runs from the first block that
holds one. Blocks before it see the same inputs and the same weights, so the
result is that of a full forward pass.

Text is measured in pieces: the same windows always share a batch. The loss of a
policy on a piece then does not depend, to the last bit, on what was measured
before, and an interrupted search can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsearch.formats import Format
from bitsearch.models.decoder import Decoder
from bitsearch.objectives.damage.kl import restart_block
from bitsearch.objectives.memory import available_bytes
from bitsearch.objectives.teacher import Teacher
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.units import Unit

# With fewer a GPU is idle, and a CPU spends its time between operations.
_PIECE_TOKENS = {"cuda": 4096, "cpu": 128}


class Replay:
    """Measures policies on pieces of text; made by `replaying`.

    Attributes:
        pieces: number of pieces that the text is cut into.
        piece_tokens: tokens of each piece.
        blocks_run: blocks run so far, one count a piece.
        blocks_skipped: blocks that a restart saved.
    """

    def __init__(
        self,
        teacher: Teacher,
        swap: Callable[[Unit, Format], None],
        units: Sequence[Unit],
        candidates: Sequence[Format],
    ) -> None:
        self._teacher = teacher
        self._decoder = teacher.decoder
        self._swap = swap
        self._units = units
        self._candidates = candidates
        windows, length = teacher.tokens.shape
        limit = max(length, _PIECE_TOKENS[self._decoder.device.type])
        divisors = (w for w in range(1, windows + 1) if windows % w == 0)
        self._windows = max(w for w in divisors if w * length <= limit)
        self.pieces = windows // self._windows
        self.piece_tokens = self._windows * length
        self.blocks_run = self.blocks_skipped = 0
        self._blocks = len(self._decoder.blocks)
        width = self._decoder.config.hidden_size
        state_bytes = 4 * self.piece_tokens * width * (self._blocks + 1)
        self._room = max(1, int(0.3 * available_bytes(self._decoder.device) // state_bytes))
        self._placed = np.full(len(units), -1, np.int64)
        self._base: NDArray[np.int64] | None = None
        # By piece: states entering block 0, 1, …, the last one after all blocks; all of
        # them still hold for the base, those that do not were cut off.
        self._states: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def kl(
        self,
        choices: Sequence[NDArray[np.int64]],
        pieces: Sequence[int],
        base: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """Mean KL a token, in nats, of each policy on each piece.

        Args:
            choices: policies of shape (units,), candidate indices.
            pieces: indices of the pieces to measure on.
            base: a policy that the others resemble; it is run once on each of
                the pieces unless that was done before. None measures in full.

        Returns:
            (choices, pieces); infinite where a policy makes the model overflow.
        """
        if base is not None:
            self._rebase(base)
            for piece in pieces:
                self._record(piece, pieces)
        found = np.empty((len(choices), len(pieces)))
        for row, choice in enumerate(choices):
            self._place(choice)
            start = None if base is None else self._first_changed(choice, base)
            for column, piece in enumerate(pieces):
                found[row, column] = self._measure(piece, start)
        return found

    def _measure(self, piece: int, start: int | None) -> float:
        part = self._part(piece)
        states = self._states.get(piece, [])
        if start is None or len(states) <= self._blocks:
            start = 0
            hidden = self._decoder.hidden(self._teacher.tokens[part])
        elif start == self._blocks:
            hidden = states[start]
        else:
            tokens = self._teacher.tokens[part]
            hidden = self._decoder.hidden(tokens, start=start, entering=states[start])
        self.blocks_run += self._blocks - start
        self.blocks_skipped += start
        value = float(self._teacher.kl_of(part, hidden).double().mean())
        # Rounding may push the KL of an almost equal model below zero.
        return math.inf if math.isnan(value) else max(0.0, value)

    def _part(self, piece: int) -> slice:
        return slice(piece * self._windows, (piece + 1) * self._windows)

    def _rebase(self, base: NDArray[np.int64]) -> None:
        """Keep the recorded states that hold for the new base too."""
        if self._base is not None:
            first = self._first_changed(base, self._base)
            if first is None:
                self._states.clear()
            else:
                for states in self._states.values():
                    del states[first + 1 :]
        self._base = base.copy()

    def _record(self, piece: int, wanted: Sequence[int]) -> None:
        """Run the base on a piece from the last state that holds."""
        states = self._states.get(piece, [])
        if len(states) > self._blocks:
            return
        if not states and len(self._states) >= self._room:
            stale = next((old for old in self._states if old not in wanted), None)
            if stale is None:
                return
            del self._states[stale]
        assert self._base is not None
        self._place(self._base)
        start = max(0, len(states) - 1)
        tokens = self._teacher.tokens[self._part(piece)]
        entering = states[start] if states else None
        later, last = self._decoder.record(tokens, start=start, entering=entering)
        self._states[piece] = [*states[:start], *later, last]
        self.blocks_run += self._blocks - start
        self.blocks_skipped += start

    def _place(self, choice: NDArray[np.int64]) -> None:
        for unit in np.flatnonzero(choice != self._placed).tolist():
            self._swap(self._units[unit], self._candidates[choice[unit]])
        self._placed = choice.copy()

    def _first_changed(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> int | None:
        """The first block that sees a difference, None if it may be the embedding."""
        changed = (self._units[unit] for unit in np.flatnonzero(one != other).tolist())
        starts = [restart_block(unit, self._blocks) for unit in changed]
        known = [start for start in starts if start is not None]
        return None if len(known) < len(starts) else min(known, default=self._blocks)


@contextmanager
def replaying(
    decoder: Decoder,
    weights: CandidateWeights,
    units: Sequence[Unit],
    candidates: Sequence[Format],
    tokens: Tensor,
) -> Iterator[Replay]:
    """A `Replay` over (windows, length) tokens; restores the model's weights at the end."""
    teacher = Teacher(decoder, tokens, restart=False)
    with weights.swapping(units) as swap:
        yield Replay(teacher, swap, units, candidates)
