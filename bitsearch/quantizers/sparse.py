"""A dense matrix in the base format, and a sparse one of what it leaves at the outliers.

W = dense + sparse. Which weights are outliers, in a number that the format fixes:

- of a base with groups, those that leave the largest error, ε_ij = h_j (w_ij − ŵ_ij)², ŵ
  rounded to nearest, h_j the mean square of input column j. The largest and the smallest
  weight of a group count by how much the error of the group falls when it is rounded
  without them, if that is more (SpQR: Dettmers et al., ICLR 2024, section 3 and algorithm
  1, with its threshold τ replaced by a number, and h_j for one over the diagonal of the
  inverse of the second moment);
- of a base with a scale or a table a row, eight ninths by size and one by ε, as SqueezeLLM's
  0.4 % and 0.05 % (Kim et al., ICML 2024, section 4.2, which weighs by gradients).

Without input statistics h = 1. The dense part is then rounded anew with zeros in the
outliers' places; in a table of a row's own these do not count. With error feedback they
stay where they are, and lose nothing but the rounding to float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsearch.formats.codebook import CodebookFormat
from bitsearch.formats.sparse import SparseFormat
from bitsearch.quantizers.codec import Codec, codec_of
from bitsearch.quantizers.feedback import feed_back, output_errors
from bitsearch.quantizers.halves import halves
from bitsearch.quantizers.parts import inner, outer
from bitsearch.quantizers.second_moment import SecondMoment

_CHUNK = 1 << 24  # weights looked at at a time


@dataclass(frozen=True, slots=True)
class Sparse:
    """An (out, in) matrix as the sum of two.

    Attributes:
        format: the format.
        dense: the dense part, encoded.
        places: (outliers,) int64, ascending: row · in + column.
        values: (outliers,) float16, what is added there.
    """

    format: SparseFormat
    dense: Any
    places: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return int(self.dense.nbytes + self.places.nbytes + self.values.nbytes)

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        found: Tensor = self.dense.dequantize()
        found.view(-1)[self.places] += self.values.float()
        return found

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        rows, columns = self.dense.codes.shape
        starts = torch.arange(rows + 1) * columns
        return {
            "values": self.values.cpu().contiguous(),
            "columns": (self.places.cpu() % columns).to(torch.uint16),
            "starts": torch.searchsorted(self.places.cpu(), starts).to(torch.int32),
            **outer("dense", self.dense.pack()),
        }


def unpack(packed: dict[str, Tensor], format: SparseFormat, in_features: int) -> Sparse:
    """The inverse of `Sparse.pack`.

    Raises:
        ValueError: the sparse part is no matrix of these columns in compressed rows.
    """
    dense = codec_of(format.base).unpack(inner("dense", packed), format.base, in_features)
    counts, columns = packed["starts"].long().diff(), packed["columns"].long()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    places = rows * in_features + columns
    if bool((columns >= in_features).any()) or not bool((places.diff() > 0).all()):
        raise ValueError(f"the outliers in {format.name} are in no order")
    return Sparse(format, dense, places, packed["values"])


def quantize(weight: Tensor, format: SparseFormat, importance: Tensor | None = None) -> Sparse:
    """Take out the weights that lose most, and round the others to nearest.

    Raises:
        BadInput: an outlier, or a scale, is beyond float16.
    """
    weight = weight.float()
    count = format.outliers(*weight.shape)
    h = torch.ones(weight.shape[1], device=weight.device)
    if importance is not None and float(importance.sum()) > 0:
        h = importance.float().to(weight.device)
    out = _outliers(weight, format, h, count)
    dense = _dense(weight, out, format, h)
    places = out.view(-1).nonzero()[:, 0]
    left = (weight - dense.dequantize()).view(-1)[places]
    return Sparse(format, dense, places, halves(left))


def _outliers(weight: Tensor, format: SparseFormat, h: Tensor, count: int) -> Tensor:
    """(out, in) where the outliers are."""
    rows = max(1, _CHUNK // weight.shape[1])
    score = torch.empty_like(weight)
    if format.base.group_size is not None:
        for part, found in zip(weight.split(rows), score.split(rows), strict=True):
            found.copy_(_gains(part, format, h))
        return _largest(score, count)
    last = -(-count // 9)
    large = _largest(weight.abs(), count - last)
    for part, out, found in zip(
        weight.split(rows), large.split(rows), score.split(rows), strict=True
    ):
        found.copy_(_losses(part, out, format, h).masked_fill_(out, -1.0))
    return large | _largest(score, last)


def _gains(weight: Tensor, format: SparseFormat, h: Tensor) -> Tensor:
    """(out, in) by how much the error falls without each weight."""
    columns = weight.shape[1]
    size = format.base.group_size or columns

    def grouped(values: Tensor, padding: float) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, -columns % size), value=padding)
        return padded.view(len(values), -1, size)

    none = torch.zeros_like(weight, dtype=torch.bool)
    gains = grouped(_losses(weight, none, format, h), 0.0)
    before = gains.sum(-1, keepdim=True)
    largest = grouped(weight, -torch.inf).argmax(-1, keepdim=True)
    smallest = grouped(weight, torch.inf).argmin(-1, keepdim=True)
    for end in (largest, smallest):
        out = grouped(none, 0.0).scatter(-1, end, True).flatten(1)[:, :columns]
        after = grouped(_losses(weight, out, format, h), 0.0).sum(-1, keepdim=True)
        gains.scatter_(-1, end, torch.maximum(gains.gather(-1, end), before - after))
    found: Tensor = gains.flatten(1)[:, :columns]
    return found


def _losses(weight: Tensor, out: Tensor, format: SparseFormat, h: Tensor) -> Tensor:
    """(out, in) ε of the dense part without some weights; 0 of these."""
    dense: Tensor = _dense(weight, out, format, h).dequantize()
    return dense.sub_(weight).square_().mul_(h).masked_fill_(out, 0.0)


def _dense(weight: Tensor, out: Tensor, format: SparseFormat, h: Tensor) -> Any:
    """The weights without some, rounded to nearest."""
    if isinstance(format.base, CodebookFormat):
        h = h.expand(weight.shape).masked_fill(out, 0.0)
    return codec_of(format.base).round_to_nearest(weight.masked_fill(out, 0.0), format.base, h)


def _largest(score: Tensor, count: int) -> Tensor:
    """Where the `count` largest of a matrix are; of equal ones the first."""
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.view(-1)
    # topk would copy every entry with its index
    least = float(np.partition(flat.cpu().numpy(), -count)[-count])
    found = flat > least
    found[(flat == least).nonzero()[: count - int(found.sum()), 0]] = True
    return found.view(score.shape)


def with_feedback(
    weight: Tensor, format: SparseFormat, importance: Tensor | None, moment: SecondMoment
) -> Sparse:
    """Columns in the order of the diagonal of G; outliers follow what is fed back to them.

    Of each row, what is rounded to nearest is kept where its output error is less.

    Raises:
        BadInput: an outlier, or a scale, is beyond float16.
    """
    weight = weight.float()
    plain = quantize(weight, format, importance)
    columns = weight.shape[1]
    order, upper = moment.feedback
    nearest = codec_of(format.base).nearest
    assert nearest is not None
    dense = replace(plain.dense, codes=torch.empty_like(plain.dense.codes))
    values = torch.empty_like(plain.values)
    by_column = (plain.places % columns).argsort(stable=True)
    counts = torch.bincount(plain.places % columns, minlength=columns)
    outliers = by_column.split(counts.tolist())

    def round_column(found: Tensor, column: int) -> Tensor:
        dense.codes[:, column], decoded = nearest(dense, found, column)
        which = outliers[column]
        rows = plain.places[which] // columns
        values[which] = halves(found[rows] - decoded[rows])
        decoded[rows] += values[which].float()
        return decoded

    feed_back(weight, order.tolist(), upper, round_column)
    fed = replace(plain, dense=dense, values=values)
    worse = output_errors(weight, fed, moment) >= output_errors(weight, plain, moment)
    dense.codes[worse] = plain.dense.codes[worse]
    back = worse[plain.places // columns]
    values[back] = plain.values[back]
    return fed


CODEC = Codec(quantize, unpack, feed_back=with_feedback)
