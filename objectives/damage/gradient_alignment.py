"""First-order gain of leaving the lowest width, taken at the low-width model (mlx-lm).

    s = (10⁶ / n_u) · max(0, Σ g ⊙ (Ŵ_c − Ŵ_high)),   g = ∂KL(reference ‖ low) / ∂W

`low` is the model with every unit in its smallest candidate, `high` the unit's
largest. The sensitivities of mlx-lm's dynamic quantization (mlx_lm/quant/
dynamic_quant.py, version 0.32) for c = low; it has two candidates, others
follow the same formula. At the reference this gradient vanishes; at the low
model it does not. A positive sum says that moving to `high` lowers the KL. Per
weight, so that the ranking is one of gain a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitsearch.objectives.damage.gradients import differentiable, oriented
from bitsearch.objectives.damage.scoring import LOWEST, Cell, Scoring, by_unit


def gradient_alignment(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Alignment of the low model's KL gradient with the way down from the largest candidate."""
    gradients = low_gradient(scoring, sorted({unit for unit, _ in cells}))
    for unit, candidates in by_unit(cells):
        matrices = scoring.units[unit].matrices
        _, high = _ends(scoring, unit)
        tops = [scoring.error(matrix, high) for matrix in matrices]
        reached = any(bool(gradients[matrix.name].any()) for matrix in matrices)
        for candidate in candidates:
            aligned = sum(
                float(
                    scoring.error(m, candidate)
                    .sub_(top)
                    .mul_(oriented(m, gradients[m.name]))
                    .sum(dtype=torch.float64)
                )
                for m, top in zip(matrices, tops, strict=True)
            )
            floor = LOWEST if reached and candidate != high else 0.0
            yield unit, candidate, max(floor, 1e6 * aligned / scoring.units[unit].parameters)


def low_gradient(scoring: Scoring, units: Sequence[int]) -> dict[str, Tensor]:
    """Gradient of the mean KL a token at the low-width model, as stored, by matrix name."""
    decoder = scoring.decoder
    matrices = [matrix for unit in units for matrix in scoring.units[unit].matrices]
    windows = scoring.tokens.to(decoder.device)
    with torch.no_grad():
        targets = [_log_probabilities(scoring, window).cpu() for window in windows]
    low = [
        (scored, scoring.candidates[_ends(scoring, index)[0]])
        for index, scored in enumerate(scoring.units)
    ]
    with scoring.weights.applied(low), differentiable(decoder, matrices) as parameters:
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for window, target in zip(windows, targets, strict=True):
            log_p = target.to(decoder.device)
            loss = ((log_p - _log_probabilities(scoring, window)) * log_p.exp()).sum(-1).mean()
            for total, part in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += part
    means = (total / len(windows) for total in sums)
    return dict(zip((matrix.name for matrix in matrices), means, strict=True))


def _log_probabilities(scoring: Scoring, window: Tensor) -> Tensor:
    """(length, vocabulary) log-probabilities of the model as it is now."""
    logits = scoring.decoder.logits(scoring.decoder.hidden(window[None]))[0]
    return logits.log_softmax(-1)


def _ends(scoring: Scoring, unit: int) -> tuple[int, int]:
    """The unit's candidates of fewest and of most bytes; of equal ones by bits."""
    sizes = [
        (sum(m.count * f.bytes(m.out_features, m.in_features) for m in matrices), f.bits)
        for matrices in [scoring.units[unit].matrices]
        for f in scoring.candidates
    ]
    return sizes.index(min(sizes)), sizes.index(max(sizes))
