"""Tables of levels: round to the nearest level, with the scale that fits best.

Per group a few scales around the one that maps the largest weight to the largest
level are tried, as far as the scale's own type has them; for free scales the best
is refitted by least squares. The least weighted squared error wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats.levels import LevelFormat
from bitsearch.quantizers.codec import Codec
from bitsearch.quantizers.grouped import by_group, spread
from bitsearch.quantizers.quantized import pack_rows, unpack_rows

_FREE_SHARES = (1.15, 1.08, 1.0, 0.94, 0.88, 0.82, 0.76, 0.70)
_BLOCK_SHARES = (1.5, 1.33, 1.22, 1.1, 1.0, 0.92, 0.85, 0.78, 0.7, 0.6)  # E4M3 is coarse
_TINY = {"float16": 2.0**-24, "float32": 2.0**-126, "e8m0": 2.0**-127, "e4m3": 2.0**-9}
_E4M3_MAX = 448.0
_E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class Levelled:
    """Codes of an (out, in) matrix with `groups` groups in a row.

    Attributes:
        format: the format.
        codes: (out, in) uint8.
        scales: (out, groups) float32 values of the stored scales.
        whole: float32 scale of the matrix; 1 where the format has none.
    """

    format: LevelFormat
    codes: Tensor
    scales: Tensor
    whole: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32: level · scale of the group · scale of the matrix."""
        columns = self.codes.shape[1]
        size = self.format.group_size or columns
        values = _levels(self.format, self.codes.device)[0][self.codes.int()]
        return values.mul_(spread(self.scales * self.whole, size, columns))

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        packed = {
            "codes": torch.from_numpy(pack_rows(self.codes.cpu().numpy(), self.format.bits)),
            "scales": _stored(self.scales.cpu(), self.format.table.scale),
        }
        if self.format.table.scale == "e4m3":
            packed["scale"] = self.whole.reshape(1).cpu()
        return packed


def unpack(packed: dict[str, Tensor], format: LevelFormat, in_features: int) -> Levelled:
    """The inverse of `Levelled.pack`."""
    codes = torch.from_numpy(unpack_rows(packed["codes"].numpy(), format.bits, in_features))
    stored = packed["scales"]
    if format.table.scale == "e8m0":
        scales = torch.ldexp(torch.ones(stored.shape), stored.int() - _E8M0_BIAS)
    else:
        scales = stored.float()
    return Levelled(format, codes, scales, packed.get("scale", torch.ones(1))[0])


def quantize(weight: Tensor, format: LevelFormat, importance: Tensor | None = None) -> Levelled:
    """Quantize an (out, in) matrix to a format with a table of levels.

    Minimises Σ_j h_j (w_j − s·v(q_j))² a group over the scales s that can be stored.

    Raises:
        BadInput: a weight is too large for the format's scales.
    """
    table = format.table
    values = _levels(format, weight.device)[0]
    top = float(values[~values.isnan()].max())
    whole = torch.ones((), device=weight.device)
    if table.scale == "e4m3":
        whole = (weight.abs().amax().float() / (top * _E4M3_MAX)).clamp(min=_TINY["float32"])
    codes, scales = by_group(
        weight.float() / whole,
        importance,
        format.group_size or weight.shape[1],
        lambda groups, h: _search(groups, h, format, top),
    )
    if not torch.isfinite(scales).all():
        raise BadInput(
            f"weights up to {float(weight.abs().max()):.3g} need a scale beyond "
            f"{table.scale} in {format.name}; keep this matrix at 16 bits with --freeze"
        )
    return Levelled(format, codes, scales, whole)


def _search(weight: Tensor, h: Tensor, format: LevelFormat, top: float) -> tuple[Tensor, Tensor]:
    """The best (codes, scales) of (rows, groups, size) weights."""
    scale = format.table.scale
    peak = weight.abs().amax(-1, keepdim=True) / top
    if scale == "e8m0":
        power = torch.floor(torch.log2(peak.clamp(min=_TINY["e8m0"])))
        tried = [torch.exp2(power + step) for step in (1, 0)]
    else:
        shares = _BLOCK_SHARES if scale == "e4m3" else _FREE_SHARES
        tried = [peak * share for share in shares]
    best = torch.full_like(peak, torch.inf)
    best_scale = torch.full_like(peak, torch.inf)

    def keep_better(candidate: Tensor) -> None:
        nonlocal best, best_scale
        candidate = _storable(candidate, scale)
        rounded = _rounded(weight, candidate, format)[1]
        error = rounded.mul_(candidate).sub_(weight).square_().mul_(h).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, candidate, best_scale)

    for candidate in tried:
        keep_better(candidate)
    if scale != "e8m0":
        values = _rounded(weight, best_scale, format)[1]
        fitted = (h * weight * values).sum(-1, keepdim=True) / (
            (h * values * values).sum(-1, keepdim=True).clamp(min=_TINY["float32"])
        )
        keep_better(torch.where(fitted > 0, fitted, best_scale))
    return _rounded(weight, best_scale, format)[0], best_scale[..., 0]


def _rounded(weight: Tensor, scale: Tensor, format: LevelFormat) -> tuple[Tensor, Tensor]:
    """Codes and values of the levels nearest to weight / scale."""
    values, order, borders = _levels(format, weight.device)
    place = torch.bucketize(weight / scale, borders)
    codes = order[place]
    return codes, values[codes.int()]


def _storable(scale: Tensor, kind: str) -> Tensor:
    """Scales rounded to what their type holds; inf where it is too small a type."""
    if kind == "e8m0":
        found = scale.clamp(min=_TINY[kind])
        return torch.where(scale > 2.0**127, torch.full_like(scale, math.inf), found)
    if kind == "e4m3":
        return scale.clamp(_TINY[kind], _E4M3_MAX).to(torch.float8_e4m3fn).float()
    found = scale.half().float() if kind == "float16" else scale
    return found.clamp(min=_TINY[kind])


def _stored(scales: Tensor, kind: str) -> Tensor:
    """Scales in their type."""
    if kind == "e8m0":
        return (torch.log2(scales) + _E8M0_BIAS).round().to(torch.uint8)
    types = {"e4m3": torch.float8_e4m3fn, "float16": torch.float16, "float32": torch.float32}
    return scales.to(types[kind]).contiguous()


@cache
def _tensors(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.tensor(LevelFormat(kind, 0).table.values, device=device)
    usable = torch.nonzero(~values.isnan())[:, 0]
    order = usable[values[usable].argsort(stable=True)]
    ranked = values[order]
    return values, order.to(torch.uint8), (ranked[1:] + ranked[:-1]) / 2


def _levels(format: LevelFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Value of every code; usable codes by value; the borders between them."""
    return _tensors(format.kind, device)


def nearest(levelled: Levelled, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes nearest to (out,) values of a column, and what they decode to."""
    format = levelled.format
    scale = levelled.scales[:, column // (format.group_size or levelled.codes.shape[1])]
    codes, found = _rounded(values / levelled.whole, scale, format)
    return codes, found.mul_(scale * levelled.whole)


CODEC = Codec(quantize, unpack, nearest)
