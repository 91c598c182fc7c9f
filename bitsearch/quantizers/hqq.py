"""HQQ: the zero point of each group by half-quadratic splitting, without calibration data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023:

    minimise over z:  Σ_j |w_j − s·(q_j − z)|^p,  q = round(w / s + z),  p = 0.7

with the scale s of min-max rounding. An error E takes up what is far off, with
e = w − s·(q − z), and the two steps alternate while β grows:

    E ← sign(e) · max(|e| − |e|^(p−1) / β, 0)          z ← mean_j (q_j − (w_j − E_j) / s)

20 steps from β = 10, growing by 1 % each, as in the release. Here errors are in units of
s, so that the result does not hang on how large weights are; the release takes them in
the weights' own unit, in which 10 is so strict for weights below 0.1 that E is 0. Of
each group the step of least Σ|e|^p is kept. It needs no inputs and ignores importance:
`rtn` on the same format, which fits scale and bias to weighted squares, usually wins
where calibration text is at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsearch.errors import UsageError
from bitsearch.formats import Format
from bitsearch.formats.affine import AffineFormat
from bitsearch.quantizers.affine import Affine, checked, fitted, stored
from bitsearch.quantizers.grouped import by_group

_POWER, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def quantize(weight: Tensor, format: Format, importance: Tensor | None = None) -> Affine:
    """Half-quadratic zero points, for the `-fz` formats; needs no calibration text.

    Raises:
        UsageError: the format has no float zero points.
        BadInput: a scale or a bias does not fit float16.
    """
    if not isinstance(format, AffineFormat):
        raise UsageError(
            f"quantizer 'hqq' fits zero points that are no whole numbers, which {format.name} "
            f"does not store; write int4-g64-fz, for example"
        )

    def search(groups: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return fitted(groups, *_half_quadratic(groups, 2**format.bits - 1), format)

    found = by_group(weight, None, format.group_size or weight.shape[1], search)
    return checked(Affine(format, *found), weight)


def _half_quadratic(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of each group, (rows, groups, 1)."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale, low = stored((high - low) / levels, low)
    steps = weight / scale
    zero = -low / scale
    best, best_zero, beta = torch.full_like(zero, torch.inf), zero, _BETA
    for _ in range(_STEPS):
        codes = (steps + zero).round_().clamp_(0, levels)
        error = steps - codes + zero
        loss = error.abs().pow_(_POWER).sum(-1, keepdim=True)
        better = loss < best
        best, best_zero = torch.where(better, loss, best), torch.where(better, zero, best_zero)
        size = error.abs()
        kept = (size - size.clamp(min=1e-6).pow_(_POWER - 1) / beta).clamp_(min=0)
        zero = (codes - steps + kept * error.sign()).mean(-1, keepdim=True)
        beta *= _GROWTH
    return scale, -best_zero * scale
