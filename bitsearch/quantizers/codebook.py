"""Codebooks: weighted k-means of each row's weights.

    minimise  Σ_j h_j (w_j − c_{q_j})²   over 2^b entries c and codes q

As in SqueezeLLM (Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", ICML 2024,
section 4.1), but h is the mean square of input column j, the same for all rows, where
the paper takes the squared gradient of each weight (its Fisher information).

Lloyd's iteration from two starts: quantiles, each entry with the same share of Σh, and
levels evenly spaced from the smallest weight to the largest. Of each row the better end
is kept. Clusters are intervals of the sorted row, so a step costs 2^b look-ups in sums
from the left. It finds a local minimum, not always the best; rows of no more than 2^b
different weights are exact up to the rounding of entries to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats.codebook import CodebookFormat
from bitsearch.quantizers.codec import Codec
from bitsearch.quantizers.quantized import pack_rows, unpack_rows

_STEPS = 100
_CHUNK = 1 << 22  # weights at a time


@dataclass(frozen=True, slots=True)
class Codebook:
    """Codes of an (out, in) matrix with a table a row.

    Attributes:
        format: the format.
        codes: (out, in) uint8.
        entries: (out, 2^bits) float16, ascending.
    """

    format: CodebookFormat
    codes: Tensor
    entries: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return self.codes.nbytes + self.entries.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32: the entry of the row that each code names."""
        return self.entries.float().gather(1, self.codes.long())

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        return {
            "codes": torch.from_numpy(pack_rows(self.codes.cpu().numpy(), self.format.bits)),
            "entries": self.entries.cpu().contiguous(),
        }


def unpack(packed: dict[str, Tensor], format: CodebookFormat, in_features: int) -> Codebook:
    """The inverse of `Codebook.pack`."""
    codes = torch.from_numpy(unpack_rows(packed["codes"].numpy(), format.bits, in_features))
    return Codebook(format, codes, packed["entries"])


def quantize(weight: Tensor, format: CodebookFormat, importance: Tensor | None = None) -> Codebook:
    """Quantize an (out, in) matrix to a codebook a row.

    Args:
        weight: (out, in), any float dtype, finite.
        format: the format.
        importance: (in,) non-negative mean squares of the inputs, or (out, in) weights of
            each squared error.

    Raises:
        BadInput: a weight is too large for float16.
    """
    peak = float(weight.abs().max())
    if peak > torch.finfo(torch.float16).max:
        raise BadInput(
            f"weights up to {peak:.3g} need an entry beyond float16 in {format.name}; "
            "keep this matrix at 16 bits with --freeze"
        )
    weight = weight.float()
    h = torch.ones(weight.shape[1], device=weight.device)
    if importance is not None and float(importance.sum()) > 0:
        h = importance.float().to(weight.device)
    h = (h / h.mean()).expand(weight.shape)
    rows = max(1, _CHUNK // weight.shape[1])
    parts = zip(weight.split(rows), h.split(rows), strict=True)
    entries = torch.cat([_entries(part, mass, 2**format.bits) for part, mass in parts])
    return Codebook(format, _codes(weight, entries), entries)


def _entries(weight: Tensor, h: Tensor, count: int) -> Tensor:
    """(rows, count) float16 entries, ascending."""
    row = _SortedRows.of(weight, h)
    found = [row.lloyd(start) for start in (row.quantiles(count), row.even(count))]
    losses = [row.loss(entries.half().double()) for entries in found]
    entries = torch.where((losses[1] < losses[0])[:, None], found[1], found[0])
    return torch.where(row.few(count)[:, None], row.distinct(count), entries).half()


def _codes(weight: Tensor, entries: Tensor) -> Tensor:
    """(out, in) uint8 codes of the nearest entries."""
    return torch.searchsorted(_borders(entries.float()), weight.contiguous()).to(torch.uint8)


def _borders(entries: Tensor) -> Tensor:
    return ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()


@dataclass(frozen=True, slots=True)
class _SortedRows:
    """Rows in ascending order, and sums from the left, in float64.

    Attributes:
        weight: (rows, in), ascending.
        sums: Σh, Σhw and Σhw² of the first k weights, each (rows, in + 1).
    """

    weight: Tensor
    sums: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, weight: Tensor, h: Tensor) -> _SortedRows:
        ascending, order = weight.double().sort(dim=1)
        mass = h.double().gather(1, order)
        terms = (mass, mass * ascending, mass * ascending.square())
        left = [torch.nn.functional.pad(term.cumsum(1), (1, 0)) for term in terms]
        return cls(ascending, (left[0], left[1], left[2]))

    def _between(self, entries: Tensor) -> list[Tensor]:
        """Each sum over the weights nearest to each entry, (rows, entries)."""
        inner = torch.searchsorted(self.weight, _borders(entries), right=True)
        columns = self.weight.shape[1]
        ends = torch.nn.functional.pad(inner, (0, 1), value=columns)
        starts = torch.nn.functional.pad(inner, (1, 0), value=0)
        return [total.gather(1, ends) - total.gather(1, starts) for total in self.sums]

    def lloyd(self, entries: Tensor) -> Tensor:
        """Entries at the means of their clusters, repeated until none moves."""
        for _ in range(_STEPS):
            mass, moment, _ = self._between(entries)
            # an entry that has lost its weights stays where it is
            moved = torch.where(mass > 0, moment / mass.clamp(min=1e-300), entries)
            moved = moved.sort(dim=1).values
            if torch.equal(moved, entries):
                break
            entries = moved
        return entries

    def loss(self, entries: Tensor) -> Tensor:
        """(rows,) Σ h (w − c)²."""
        mass, moment, square = self._between(entries)
        return (square - 2 * entries * moment + entries.square() * mass).sum(1)

    def quantiles(self, count: int) -> Tensor:
        """The weights at shares (k + ½) / count of Σh."""
        mass = self.sums[0]
        shares = (torch.arange(count, device=mass.device) + 0.5) / count
        place = torch.searchsorted(mass[:, 1:].contiguous(), mass[:, -1:] * shares)
        return self.weight.gather(1, place.clamp(max=self.weight.shape[1] - 1))

    def even(self, count: int) -> Tensor:
        """The middles of `count` equal parts of the range."""
        low, high = self.weight[:, :1], self.weight[:, -1:]
        shares = (torch.arange(count, device=low.device) + 0.5) / count
        return low + (high - low) * shares

    def few(self, count: int) -> Tensor:
        """(rows,) whether a row has no more than `count` different weights."""
        return self._index()[:, -1] < count

    def distinct(self, count: int) -> Tensor:
        """(rows, count) the different weights, the largest repeated; of rows that are few."""
        index = self._index().clamp(max=count - 1)
        found = self.weight[:, -1:].repeat(1, count)
        return found.scatter_(1, index, self.weight).sort(dim=1).values

    def _index(self) -> Tensor:
        """(rows, in) how many smaller different weights there are."""
        steps = (self.weight.diff(dim=1) > 0).cumsum(1)
        return torch.nn.functional.pad(steps, (1, 0))


def nearest(codebook: Codebook, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Codes nearest to (out,) values, and what they decode to; any column alike."""
    codes = _codes(values[:, None], codebook.entries)
    return codes[:, 0], codebook.entries.float().gather(1, codes.long())[:, 0]


CODEC = Codec(quantize, unpack, nearest)
