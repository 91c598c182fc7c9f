"""Integers with quantized scales and zero points: rounded to nearest, a level at a time.

Scales and zero points start as those of plain integers. Then, a few times over: the
scales are quantized; with them and the codes q fixed, the zero points that minimise
Σ_j h_j (w_j − s (q_j − z))² are z = mean_h (q_j − w_j / s), and are quantized; the weights
are rounded again; and the scales that fit best, Σ h w (q − z) / Σ h (q − z)², begin the
next round. Of each row the best round is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsearch.formats.bilevel import STATISTICS_GROUP, BilevelFormat
from bitsearch.formats.integer import IntFormat
from bitsearch.quantizers import affine, integer
from bitsearch.quantizers.affine import Affine
from bitsearch.quantizers.codec import Codec
from bitsearch.quantizers.grouped import spread
from bitsearch.quantizers.parts import inner, outer
from bitsearch.quantizers.quantized import pack_rows, unpack_rows

_ROUNDS = 4
_TINY = 2.0**-24
_CHUNK = 1 << 22  # weights at a time
_PARTS = ("codes", "scales", "biases")


@dataclass(frozen=True, slots=True)
class Bilevel:
    """Codes of an (out, in) matrix with `groups` groups in a row.

    Attributes:
        format: the format.
        codes: (out, in) uint8, in [0, 2^bits).
        scales: (out, groups), encoded.
        zeros: (out, groups), encoded.
    """

    format: BilevelFormat
    codes: Tensor
    scales: Affine
    zeros: Affine

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32: scale · (code − zero)."""
        scale, zero = self.statistics()
        return self.codes.float().sub_(zero).mul_(scale)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(out, in) float32 scale and zero point of every weight."""
        size, columns = self.format.group_size or 1, self.codes.shape[1]
        scales, zeros = self.scales.dequantize(), self.zeros.dequantize()
        return spread(scales, size, columns), spread(zeros, size, columns)

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        return {
            "codes": torch.from_numpy(pack_rows(self.codes.cpu().numpy(), self.format.bits)),
            **outer("scales", self.scales.pack()),
            **outer("zeros", self.zeros.pack()),
        }


def unpack(packed: dict[str, Tensor], format: BilevelFormat, in_features: int) -> Bilevel:
    """The inverse of `Bilevel.pack`."""
    codes = torch.from_numpy(unpack_rows(packed["codes"].numpy(), format.bits, in_features))
    scales, zeros = (
        affine.unpack(inner(part, packed), format.statistics, format.groups(in_features))
        for part in ("scales", "zeros")
    )
    return Bilevel(format, codes, scales, zeros)


def quantize(weight: Tensor, format: BilevelFormat, importance: Tensor | None = None) -> Bilevel:
    """Quantize an (out, in) matrix to integers with quantized scales and zero points.

    Raises:
        BadInput: a scale is beyond float16.
    """
    weight = weight.float()
    h = torch.ones(weight.shape[1]) if importance is None else importance.float()
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_fitted(part, format, h.to(weight.device)) for part in weight.split(rows)]
    return Bilevel(
        format,
        torch.cat([part.codes for part in parts]),
        _joined([part.scales for part in parts]),
        _joined([part.zeros for part in parts]),
    )


def _fitted(weight: Tensor, format: BilevelFormat, h: Tensor) -> Bilevel:
    """The best round of each row."""
    size, columns = format.group_size or 1, weight.shape[1]

    def sums(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, -columns % size))
        found: Tensor = padded.view(len(values), -1, size).sum(-1)
        return found

    mass = sums(h[None])
    h = torch.where(spread(mass, size, columns) > 0, h, torch.ones_like(h))
    mass = sums(h)
    plain = integer.quantize(weight, IntFormat("int", format.bits, size, False), h[0])
    scales, zeros = plain.scales.float(), plain.zeros.float()
    best, least = None, torch.full((len(weight),), torch.inf, device=weight.device)
    for _ in range(_ROUNDS):
        coarse = affine.quantize(scales, format.statistics)
        scale = spread(_away_from_zero(coarse.dequantize()), size, columns)
        codes = torch.round(weight / scale + spread(zeros, size, columns))
        codes = codes.clamp_(0, 2**format.bits - 1)
        zeros = sums((codes - weight / scale).mul_(h)).div_(mass)
        found = _rounded(weight, format, coarse, affine.quantize(zeros, format.statistics))
        error = (found.dequantize() - weight).square_().mul_(h).sum(1)
        best = found if best is None else _better(error < least, found, best)
        least = torch.minimum(error, least)
        apart = found.codes - found.statistics()[1]
        power = sums(apart.square().mul_(h))
        refitted = sums(apart.mul_(weight).mul_(h)) / power.clamp(min=_TINY)
        scales = torch.where((power > 0) & (refitted > 0), refitted, scales)
    assert best is not None
    return best


def _rounded(weight: Tensor, format: BilevelFormat, scales: Affine, zeros: Affine) -> Bilevel:
    """The codes nearest to weights under given scales and zero points."""
    found = Bilevel(format, torch.empty_like(weight, dtype=torch.uint8), scales, zeros)
    scale, zero = found.statistics()
    found.codes.copy_(_codes(weight, scale, zero, format))
    return found


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, format: BilevelFormat) -> Tensor:
    codes = torch.round(weight / _away_from_zero(scale) + zero)
    return codes.clamp_(0, 2**format.bits - 1)


def _away_from_zero(scale: Tensor) -> Tensor:
    """A quantized scale may be 0, where all codes are as good."""
    return torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY), scale)


def _better(better: Tensor, new: Bilevel, old: Bilevel) -> Bilevel:
    """Row by row the one or the other."""

    def mixed(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better[:, None], new, old)

    def statistics(new: Affine, old: Affine) -> Affine:
        parts = ((getattr(one, name) for one in (new, old)) for name in _PARTS)
        return Affine(new.format, *(mixed(*pair) for pair in parts))

    return Bilevel(
        new.format,
        mixed(new.codes, old.codes),
        statistics(new.scales, old.scales),
        statistics(new.zeros, old.zeros),
    )


def _joined(parts: list[Affine]) -> Affine:
    """Rows put together."""
    tensors = (torch.cat([getattr(part, name) for part in parts]) for name in _PARTS)
    return Affine(parts[0].format, *tensors)


def nearest(encoded: Bilevel, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes nearest to (out,) values of a column, and what they decode to."""
    group = column // (encoded.format.group_size or 1)
    above = group // STATISTICS_GROUP
    scale, zero = (
        part.codes[:, group].float().mul_(part.scales[:, above]).add_(part.biases[:, above])
        for part in (encoded.scales, encoded.zeros)
    )
    codes = _codes(values, scale, zero, encoded.format)
    return codes.to(torch.uint8), codes.sub(zero).mul_(scale)


CODEC = Codec(quantize, unpack, nearest)
