"""Weights left in low precision under inputs of large magnitude, as LLM.int8() decides.

    s = Σ out · |{ j : max_t |x_tj| ≥ 6 } ∖ kept columns|   over the matrices of a unit

A column of inputs that reaches 6.0 anywhere in the text is an outlier feature, and its
weights belong in 16 bits (Dettmers et al., "LLM.int8()", NeurIPS 2022, section 3.2). The
count is of the columns that a candidate really keeps, not of as many. Blind to all
else: below the threshold nothing counts, and all low precisions are alike. Inputs that
are not seen, such as those of an untied embedding, have no outliers. One forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitsearch.objectives.damage.scoring import LOWEST, Cell, Scoring, by_unit
from bitsearch.objectives.statistics import observed, run_through
from bitsearch.quantizers.codec import Encoded
from bitsearch.quantizers.columns import Columns
from bitsearch.units import Unit

THRESHOLD = 6.0


@torch.no_grad()
def outlier_features(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Number of weights that meet outlier features and are not kept in 16 bits."""
    asked = [scoring.units[unit] for unit, _ in by_unit(cells)]
    peaks: dict[str, Tensor] = {}

    def see(unit: Unit, rows: Tensor) -> None:
        peak = rows.float().abs().amax(0)
        peaks[unit.name] = torch.maximum(peak, peaks.get(unit.name, peak))

    with observed(scoring.decoder, asked, see):
        run_through(scoring.decoder, asked, scoring.tokens)
    for unit, candidates in by_unit(cells):
        scored = scoring.units[unit]
        peak = peaks.get(scored.name)
        for candidate in candidates:
            format = scoring.candidates[candidate]
            if format.exact:
                yield unit, candidate, 0.0
                continue
            missed = 0
            for matrix in scored.matrices:
                for part in scoring.weights.quantized(matrix, format):
                    missed += matrix.out_features * _missed(part, peak)
            yield unit, candidate, max(float(missed), LOWEST)


def _missed(encoded: Encoded, peak: Tensor | None) -> int:
    """Outlier features that an encoded matrix does not keep in 16 bits."""
    if peak is None:
        return 0
    outlying = peak >= THRESHOLD
    if isinstance(encoded, Columns) and encoded.kept.format.exact:
        outlying[encoded.columns] = False
    return int(outlying.sum())
