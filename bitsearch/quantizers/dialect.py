"""BlockDialect: the dialect of each block by least error, or by the published look-up.

Both take the shared exponent from the block's largest weight, as in the paper:
its float16 exponent less 2, so that the largest weight lies between 8 and 16 halves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format
from bitsearch.formats.dialect import BLOCK, DIALECTS, HEADER_BITS, DialectFormat
from bitsearch.quantizers.codec import Codec, Encoded
from bitsearch.quantizers.grouped import by_group, spread
from bitsearch.quantizers.quantized import pack_rows, unpack_rows

_BIAS = 15  # of the float16 exponent
_MOST = 30  # 31 is infinity

Choose = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Dialected:
    """Codes of an (out, in) matrix in `blocks` blocks a row.

    Attributes:
        format: the format.
        codes: (out, in) uint8: sign · 8 + index of the magnitude.
        dialects: (out, blocks) uint8.
        exponents: (out, blocks) uint8, float16 exponents of the largest weights.
    """

    format: DialectFormat
    codes: Tensor
    dialects: Tensor
    exponents: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return self.codes.nbytes + self.dialects.nbytes + self.exponents.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32: ± magnitude / 2 · 2^(exponent − 15 − 2)."""
        columns = self.codes.shape[1]
        table = _magnitudes(self.codes.device)
        dialects = spread(self.dialects.int(), BLOCK, columns)
        values = table[dialects, (self.codes & 7).int()]
        signs = 1.0 - 2.0 * (self.codes >> 3).float()
        return values * signs * spread(_scale(self.exponents), BLOCK, columns)

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        headers = self.dialects.short() | self.exponents.short() << 4
        low, high = (headers & 255).to(torch.uint8), (headers >> 8).to(torch.uint8)
        bits = torch.stack([*_bits(low, 8), *_bits(high, 1)], -1).flatten(1)
        return {
            "codes": torch.from_numpy(pack_rows(self.codes.cpu().numpy(), 4)),
            "blocks": torch.from_numpy(pack_rows(bits.cpu().numpy(), 1)),
        }


def _bits(value: Tensor, count: int) -> list[Tensor]:
    return [value >> place & 1 for place in range(count)]


def unpack(packed: dict[str, Tensor], format: DialectFormat, in_features: int) -> Dialected:
    """The inverse of `Dialected.pack`."""
    blocks = format.groups(in_features)
    bits = torch.from_numpy(unpack_rows(packed["blocks"].numpy(), 1, blocks * HEADER_BITS))
    parts = bits.reshape(len(bits), blocks, HEADER_BITS).int()
    value = (parts << torch.arange(HEADER_BITS)).sum(-1)
    codes = torch.from_numpy(unpack_rows(packed["codes"].numpy(), 4, in_features))
    return Dialected(format, codes, (value & 15).to(torch.uint8), (value >> 4).to(torch.uint8))


def quantize(weight: Tensor, format: DialectFormat, importance: Tensor | None = None) -> Dialected:
    """Every block in the dialect of least (weighted) squared error."""
    return _quantize(weight, format, importance, _least_error)


def lookup(weight: Tensor, format: Format, importance: Tensor | None = None) -> Encoded:
    """Every block in the dialect of the published two-stage look-up (section 3.3).

    The block's largest magnitude, truncated to halves, selects the two dialects that
    end there; the one whose own level has more weights nearest to it is taken.

    Raises:
        UsageError: the format has no dialects.
    """
    if not isinstance(format, DialectFormat):
        raise UsageError(f"quantizer 'dialect_lookup' rounds into dialect4-b32, not {format.name}")
    return _quantize(weight, format, None, _looked_up)


def _quantize(
    weight: Tensor, format: DialectFormat, importance: Tensor | None, choose: Choose
) -> Dialected:
    if float(weight.abs().max()) >= 65536.0:
        raise BadInput(
            f"weights up to {float(weight.abs().max()):.3g} need an exponent beyond float16 in "
            f"{format.name}; keep this matrix at 16 bits with --freeze"
        )

    def search(groups: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        peak = groups.abs().amax(-1)
        exponents = torch.frexp(peak).exponent - 1 + _BIAS
        exponents = torch.where(peak > 0, exponents, torch.zeros_like(exponents))
        exponents = exponents.clamp_(0, _MOST).to(torch.uint8)
        halves = groups.abs() / _scale(exponents)[..., None]
        dialects = choose(halves, h)
        codes = _nearest(halves, dialects) | (groups < 0).to(torch.uint8) << 3
        return codes, dialects, exponents

    return Dialected(format, *by_group(weight, importance, BLOCK, search))


def _scale(exponents: Tensor) -> Tensor:
    """The value of one half unit: 2^(exponent − 15 − 2 − 1)."""
    return torch.exp2(exponents.float() - _BIAS - 3)


def _magnitudes(device: torch.device) -> Tensor:
    """(16, 8) magnitudes in halves."""
    return torch.tensor(DIALECTS, dtype=torch.float32, device=device)


def _nearest(halves: Tensor, dialects: Tensor) -> Tensor:
    """Index of the nearest magnitude of each block's dialect."""
    table = _magnitudes(halves.device)
    borders = (table[:, 1:] + table[:, :-1]) / 2
    return (halves[..., None] > borders[dialects.int()][..., None, :]).sum(-1).to(torch.uint8)


def _least_error(halves: Tensor, h: Tensor) -> Tensor:
    """(rows, blocks) dialects with the least Σ h (w − ŵ)²."""
    table = _magnitudes(halves.device)
    best = torch.full(halves.shape[:-1], torch.inf, device=halves.device)
    chosen = torch.zeros(halves.shape[:-1], dtype=torch.uint8, device=halves.device)
    for dialect, levels in enumerate(table):
        borders = (levels[1:] + levels[:-1]) / 2
        values = levels[torch.bucketize(halves, borders)]
        error = values.sub_(halves).square_().mul_(h).sum(-1)
        chosen = torch.where(error < best, torch.full_like(chosen, dialect), chosen)
        best = torch.minimum(best, error)
    return chosen


def _looked_up(halves: Tensor, h: Tensor) -> Tensor:
    """(rows, blocks) dialects by the block maximum, then by counts."""
    first = 2 * (15 - halves.amax(-1).floor().clamp(8, 15).int())
    starts, ends = _own_ranges(halves.device)
    counts = [
        (
            (halves >= starts[first + offset][..., None])
            & (halves < ends[first + offset][..., None])
        ).sum(-1)
        for offset in (0, 1)
    ]
    return (first + (counts[1] > counts[0]).int()).to(torch.uint8)


def _own_ranges(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each dialect's own level (the one its pair lacks) is nearer than its pair's levels."""
    starts, ends = [], []
    for index, levels in enumerate(DIALECTS):
        other = DIALECTS[index ^ 1]
        (own,) = set(levels) - set(other)
        around = sorted({*levels, *other})
        place = around.index(own)
        starts.append((around[place - 1] + own) / 2)
        ends.append((around[place + 1] + own) / 2)
    return torch.tensor(starts, device=device), torch.tensor(ends, device=device)


def nearest(dialected: Dialected, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes nearest to (out,) values of a column, and what they decode to."""
    block = column // BLOCK
    dialects, scale = dialected.dialects[:, block], _scale(dialected.exponents[:, block])
    found = _nearest((values.abs() / scale)[:, None, None], dialects[:, None])[:, 0, 0]
    decoded = _magnitudes(values.device)[dialects.int(), found.int()] * scale
    negative = values < 0
    return found | negative.to(torch.uint8) << 3, torch.where(negative, -decoded, decoded)


CODEC = Codec(quantize, unpack, nearest)
