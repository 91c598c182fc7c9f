"""Divergence of the model with one unit in a candidate and all others in the widest (AMQ).

    s = mean_t JSD(p_t, q_t),   JSD = ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = (p + q)/2

p is the reference and q the model as said; AMQ (Lee et al., EMNLP 2025) takes 2
bits against 4 everywhere else. Not a difference from the widest model: its own
divergence is part of every entry, and most units look alike, so that those far
above the median stand out. One forward pass from the unit's block on for each
cell, and all other units are put in place again for each unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitsearch.objectives.damage.kl import restart_block
from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit


@torch.no_grad()
def jsd_from_widest(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Mean Jensen-Shannon divergence a token, in nats; infinite where the model overflows."""
    decoder, widest = scoring.decoder, widest_candidate(scoring)
    windows = [window[None] for window in scoring.tokens.to(decoder.device)]
    reference = [_log_probabilities(scoring, decoder.hidden(window)).cpu() for window in windows]
    everything = [(unit, scoring.candidates[widest]) for unit in scoring.units]
    with scoring.weights.applied(everything):
        recorded = [decoder.record(window) for window in windows]
    for unit, candidates in by_unit(cells):
        scored = scoring.units[unit]
        start = restart_block(scored, len(decoder.blocks))
        for candidate in candidates:
            others = [pair for pair in everything if pair[0] is not scored]
            choice = [*others, (scored, scoring.candidates[candidate])]
            total = 0.0
            with scoring.weights.applied(choice):
                for window, log_p, (entering, last) in zip(
                    windows, reference, recorded, strict=True
                ):
                    if start is None:
                        hidden = decoder.hidden(window)
                    elif start == len(decoder.blocks):
                        hidden = last
                    else:
                        hidden = decoder.hidden(window, start=start, entering=entering[start])
                    log_q = _log_probabilities(scoring, hidden)
                    total += float(divergence(log_p.to(log_q.device), log_q).mean())
            found = total / len(windows)
            yield unit, candidate, math.inf if math.isnan(found) else max(0.0, found)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(rows,) Jensen-Shannon divergence of (rows, vocabulary) log-probabilities."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    first = (log_p.exp() * (log_p - log_m)).sum(-1)
    return 0.5 * (first + (log_q.exp() * (log_q - log_m)).sum(-1))


def widest_candidate(scoring: Scoring) -> int:
    """The candidate of most bytes on the first unit; of equal ones by bits."""
    matrix = scoring.units[0].matrices[0]
    sizes = [
        (format.bytes(matrix.out_features, matrix.in_features), format.bits)
        for format in scoring.candidates
    ]
    return sizes.index(max(sizes))


def _log_probabilities(scoring: Scoring, hidden: Tensor) -> Tensor:
    """(length, vocabulary) of (1, length, width) last hidden states, by the head in place now."""
    return scoring.decoder.logits(hidden[0]).log_softmax(-1)
