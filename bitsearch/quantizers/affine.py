"""Integers with float zero points: round to nearest, scale and bias by least squares.

Per group a grid of shrunken ranges is tried, both ends drawn in alike. The best is
refitted a few times: with codes q fixed, the scale s and bias b that minimise
Σ_j h_j (w_j − s·q_j − b)² are those of a weighted linear regression; then weights are
rounded again. The least error over all tries wins, plain min-max rounding among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats.affine import AffineFormat
from bitsearch.quantizers.codec import Codec
from bitsearch.quantizers.grouped import by_group, spread
from bitsearch.quantizers.integer import shrinks
from bitsearch.quantizers.quantized import pack_rows, unpack_rows

_REFITS = 3
_TINY = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True, slots=True)
class Affine:
    """Codes of an (out, in) matrix with `groups` groups in a row.

    Attributes:
        format: the format.
        codes: (out, in) uint8, in [0, 2^bits).
        scales: (out, groups) float16.
        biases: (out, groups) float16.
    """

    format: AffineFormat
    codes: Tensor
    scales: Tensor
    biases: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return self.codes.nbytes + self.scales.nbytes + self.biases.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32: scale · code + bias."""
        columns = self.codes.shape[1]
        size = self.format.group_size or columns
        values = self.codes.float().mul_(spread(self.scales.float(), size, columns))
        return values.add_(spread(self.biases.float(), size, columns))

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        return {
            "codes": torch.from_numpy(pack_rows(self.codes.cpu().numpy(), self.format.bits)),
            "scales": self.scales.cpu().contiguous(),
            "biases": self.biases.cpu().contiguous(),
        }


def unpack(packed: dict[str, Tensor], format: AffineFormat, in_features: int) -> Affine:
    """The inverse of `Affine.pack`."""
    codes = torch.from_numpy(unpack_rows(packed["codes"].numpy(), format.bits, in_features))
    return Affine(format, codes, packed["scales"], packed["biases"])


def quantize(weight: Tensor, format: AffineFormat, importance: Tensor | None = None) -> Affine:
    """Quantize an (out, in) matrix to integers with a float zero point.

    Raises:
        BadInput: a scale or a bias does not fit float16.
    """

    def search(groups: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return fitted(groups, *_search(groups, h, format), format)

    found = by_group(weight, importance, format.group_size or weight.shape[1], search)
    return checked(Affine(format, *found), weight)


def checked(found: Affine, weight: Tensor) -> Affine:
    """The same matrix, if its scales and biases are finite."""
    if not (found.scales.isfinite().all() and found.biases.isfinite().all()):
        raise BadInput(
            f"weights up to {float(weight.abs().max()):.3g} need a scale or a bias beyond float16 "
            f"in {found.format.name}; keep this matrix at 16 bits with --freeze"
        )
    return found


def fitted(weight: Tensor, scale: Tensor, bias: Tensor, format: AffineFormat) -> tuple[Tensor, ...]:
    """Codes, scales and biases of (rows, groups, size) weights, as they are stored."""
    scale, bias = stored(scale, bias)
    codes = _codes(weight, scale, bias, format).to(torch.uint8)
    return codes, scale[..., 0].half(), bias[..., 0].half()


def stored(scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A scale that is not 0 and a bias, rounded to float16."""
    return scale.half().float().clamp(min=_TINY), bias.half().float()


def _codes(weight: Tensor, scale: Tensor, bias: Tensor, format: AffineFormat) -> Tensor:
    return weight.sub(bias).div_(scale).round_().clamp_(0, 2**format.bits - 1)


def _search(weight: Tensor, h: Tensor, format: AffineFormat) -> tuple[Tensor, Tensor]:
    """The best scale and bias of each group, (rows, groups, 1)."""
    levels = 2**format.bits - 1
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    # What no float16 fits keeps an infinite scale, which is refused.
    best = [torch.full_like(low, torch.inf) for _ in range(2)] + [torch.zeros_like(low)]
    h = h.expand_as(weight)

    def keep_better(scale: Tensor, bias: Tensor) -> None:
        scale, bias = stored(scale, bias)
        error = _codes(weight, scale, bias, format).mul_(scale).add_(bias)
        error = error.sub_(weight).square_().mul_(h).sum(-1, keepdim=True)
        better = error < best[0]
        best[:] = [
            torch.where(better, new, old)
            for new, old in zip((error, scale, bias), best, strict=True)
        ]

    for share in shrinks(format):
        cut = (high - low) * (1 - share) / 2
        keep_better((high - low) * (share / levels), low + cut)
    for _ in range(_REFITS):
        keep_better(*_regression(weight, h, _codes(weight, best[1], best[2], format)))
    return best[1], best[2]


def _regression(weight: Tensor, h: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """s and b of the weighted line w ≈ s·q + b; s is 0 where all codes are one."""
    mass = h.sum(-1, keepdim=True)
    code, value = ((h * x).sum(-1, keepdim=True) / mass for x in (codes, weight))
    apart = codes - code
    spread_ = (h * apart * apart).sum(-1, keepdim=True)
    scale = (h * apart * weight).sum(-1, keepdim=True) / spread_.clamp(min=_TINY)
    return scale, value - scale * code


def nearest(affine: Affine, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes nearest to (out,) values of a column, and what they decode to."""
    group = column // (affine.format.group_size or affine.codes.shape[1])
    scale, bias = affine.scales[:, group].float(), affine.biases[:, group].float()
    codes = _codes(values, scale, bias, affine.format)
    return codes.to(torch.uint8), codes.mul(scale).add_(bias)


CODEC = Codec(quantize, unpack, nearest)
