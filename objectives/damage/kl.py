"""Measured KL of one candidate at a time, restarting from the perturbed block.

    s = mean_t KL(p_t ‖ q_t),  q the model with this unit alone quantized

The one-at-a-time sensitivity of ZeroQ (CVPR 2020) on real text, forward passes
only. A unit of block i reuses the recorded state that enters the block, so a
sweep over all blocks costs about half of the full passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit
from bitsearch.objectives.teacher import Teacher
from bitsearch.units import Unit


def kl(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Mean KL a token, in nats, of the model with one unit in one candidate.

    Infinite where the candidate makes the model overflow.
    """
    teacher = Teacher(scoring.decoder, scoring.tokens, restart=True)
    for unit, candidates in by_unit(cells):
        start = restart_block(scoring.units[unit], len(scoring.decoder.blocks))
        for candidate in candidates:
            if not any(scoring.error(m, candidate).any() for m in scoring.units[unit].matrices):
                yield unit, candidate, 0.0  # weights of a 16-bit checkpoint in its own format
                continue
            with scoring.weights.applied([(scoring.units[unit], scoring.candidates[candidate])]):
                damage = float(teacher.kl(start).double().mean())
            # Rounding may push the KL of an almost equal model below zero.
            yield unit, candidate, math.inf if math.isnan(damage) else max(0.0, damage)


def restart_block(unit: Unit, blocks: int) -> int | None:
    """The first block that sees a change of the unit: see `Teacher.measure`."""
    if unit.kind == "head":
        return blocks
    return unit.block
