"""Integers: round to nearest, with a searched clipping range and a least-squares scale.

Per group, a grid of shrunken ranges is tried; then the scale is refitted to
the chosen codes by least squares and the weights are rounded once more. The
candidate with the least weighted squared error wins, so the result is never
worse than plain min-max rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.quantizers.codec import Codec
from bitsearch.quantizers.grouped import by_group
from bitsearch.quantizers.quantized import Quantized, unpack

# Smallest range tried, as a share of min-max: few levels gain from clipping
# more, while with 6 bits or more the optimum lies close to the full range.
_SHRINK = {2: 0.50, 3: 0.62, 4: 0.72, 5: 0.80, 6: 0.88, 7: 0.94, 8: 0.96}
_STEPS = {2: 12, 3: 12, 4: 10, 5: 8, 6: 6, 7: 4, 8: 3}
_TINY = 2.0**-24  # the smallest positive float16


def quantize(weight: Tensor, format: Format, importance: Tensor | None = None) -> Quantized:
    """Quantize an (out, in) matrix to an integer format.

    Minimises, per group, Σ_j h_j (w_j − s·(q_j − z))² over the clipping range
    and the scale s; h is the mean square of input column j, or 1.

    Args:
        weight: (out, in), any float dtype, finite.
        format: an integer format.
        importance: (in,) non-negative mean squares of the inputs.

    Raises:
        BadInput: a scale does not fit float16.
    """
    codes, scales, zeros = by_group(
        weight,
        importance,
        format.group_size or weight.shape[1],
        lambda groups, h: _search(groups, h, format),
    )
    if not torch.isfinite(scales).all():
        raise BadInput(
            f"weights up to {float(weight.abs().max()):.3g} need a scale beyond float16 in "
            f"{format.name}; keep this matrix at 16 bits with --freeze"
        )
    return Quantized(format, codes, scales, zeros)


def _search(weight: Tensor, h: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """The best (codes, scales, zeros) of one chunk over the grid of ranges."""
    levels = 2**format.bits - 1
    low = weight.amin(-1, keepdim=True).clamp_(max=0)
    high = weight.amax(-1, keepdim=True).clamp_(min=0)
    peak = torch.maximum(-low, high)
    best = torch.full_like(low, torch.inf)
    # What no finite scale fits keeps an infinite one, which is refused.
    best_scale, best_zero = torch.full_like(low, torch.inf), torch.zeros_like(low)
    for shrink in shrinks(format):
        if format.symmetric:
            # Codes reach one level further down than up: put the larger side there.
            sign = torch.where(-low >= high, 1.0, -1.0)
            scale = sign * peak * shrink / (levels + 1) * 2
            zero = torch.full_like(low, (levels + 1) // 2)
        else:
            scale = (high - low) * shrink / levels
            zero = None
        best, best_scale, best_zero = _keep_better(
            weight, h, low * shrink, scale, zero, levels, best, best_scale, best_zero
        )
    shifted = torch.round(weight / best_scale).add_(best_zero).clamp_(0, levels).sub_(best_zero)
    fitted = (h * weight * shifted).sum(-1, keepdim=True) / (
        (h * shifted * shifted).sum(-1, keepdim=True).clamp_(min=_TINY)
    )
    fitted = torch.where(fitted * best_scale > 0, fitted, best_scale)
    best, best_scale, best_zero = _keep_better(
        weight, h, low, fitted, best_zero, levels, best, best_scale, best_zero
    )
    codes = torch.round(weight / best_scale).add_(best_zero).clamp_(0, levels)
    return codes.to(torch.uint8), best_scale[..., 0].half(), best_zero[..., 0].to(torch.uint8)


def shrinks(format: Format) -> list[float]:
    """The ranges to try, as shares of min-max."""
    levels, steps = 2**format.bits - 1, _STEPS[format.bits]
    shares = [1 - (1 - _SHRINK[format.bits]) * index / (steps - 1) for index in range(steps)]
    # Symmetric codes reach less far up than down; one step wider, both ends of a range fit.
    return [(levels + 1) / (levels - 1), *shares] if format.symmetric else shares


def _keep_better(
    weight: Tensor,
    h: Tensor,
    low: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: int,
    best: Tensor,
    best_scale: Tensor,
    best_zero: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Try a scale (rounded to float16) on every group; keep it where the error falls."""
    scale = scale.half().float()
    scale = torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY), scale)
    if zero is None:
        zero = torch.round(-low / scale).clamp_(0, levels)
    error = torch.round(weight / scale).add_(zero).clamp_(0, levels).sub_(zero)
    error = error.mul_(scale).sub_(weight).square_().mul_(h).sum(-1, keepdim=True)
    better = error < best
    return (
        torch.where(better, error, best),
        torch.where(better, scale, best_scale),
        torch.where(better, zero, best_zero),
    )


def nearest(quantized: Quantized, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes nearest to (out,) values of a column, and what they decode to."""
    format = quantized.format
    group = column // (format.group_size or quantized.codes.shape[1])
    scale, zero = quantized.scales[:, group].float(), quantized.zeros[:, group].float()
    codes = torch.round(values / scale).add_(zero).clamp_(0, 2**format.bits - 1)
    return codes.to(torch.uint8), codes.sub_(zero).mul_(scale)


CODEC = Codec(quantize, unpack, nearest)
