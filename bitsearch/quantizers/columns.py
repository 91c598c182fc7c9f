"""Whole input columns in higher precision, the others rounded as their base says.

The kept columns are those of the largest

    λ_j = h_j ‖w_j − ŵ_j‖²

with ŵ the whole matrix rounded to nearest in the base format and h_j the mean square of
input column j, a diagonal element of the second moment (OWQ: Lee et al., AAAI 2024,
equation 4). Without input statistics h = 1: the error of the weights alone decides. The
same columns serve all rows, and each matrix chooses its own.

With error feedback the kept columns come last, so that they take up what the others have
lost (OWQ; QUIK: Ashkboos et al., EMNLP 2024, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitsearch.formats.columns import ColumnsFormat
from bitsearch.quantizers.codec import Codec, codec_of
from bitsearch.quantizers.feedback import feed_back, output_errors
from bitsearch.quantizers.parts import inner, outer
from bitsearch.quantizers.second_moment import SecondMoment


@dataclass(frozen=True, slots=True)
class Columns:
    """An (out, in) matrix in two parts.

    Attributes:
        format: the format.
        place: (in,) int64: the columns of the base in ascending order, then the kept ones.
        rest: (out, in − kept) encoded columns of the base.
        kept: (out, kept) encoded columns.
    """

    format: ColumnsFormat
    place: Tensor
    rest: Any
    kept: Any

    @property
    def columns(self) -> Tensor:
        """(kept,) int64, ascending: the columns that are kept."""
        return self.place[len(self.place) - self.kept.codes.shape[1] :]

    @property
    def nbytes(self) -> int:
        """Memory of the unpacked tensors."""
        return int(self.place.nbytes + self.rest.nbytes + self.kept.nbytes)

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        parts = torch.cat([self.rest.dequantize(), self.kept.dequantize()], dim=1)
        return parts[:, self.place.argsort()]

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""
        return {
            "columns": self.columns.cpu().to(torch.uint16),
            **outer("kept", self.kept.pack()),
            **outer("rest", self.rest.pack()),
        }


def unpack(packed: dict[str, Tensor], format: ColumnsFormat, in_features: int) -> Columns:
    """The inverse of `Columns.pack`.

    Raises:
        ValueError: the indices are not those of ascending columns.
    """
    columns = packed["columns"].long()
    if not bool((columns.diff() > 0).all()) or int(columns[-1]) >= in_features:
        raise ValueError(f"the kept columns in {format.name} are in no order")
    base, kept = codec_of(format.base), codec_of(format.kept)
    return Columns(
        format,
        _place(columns, in_features),
        base.unpack(inner("rest", packed), format.base, in_features - len(columns)),
        kept.unpack(inner("kept", packed), format.kept, len(columns)),
    )


def quantize(weight: Tensor, format: ColumnsFormat, importance: Tensor | None = None) -> Columns:
    """Keep the columns that lose most, and round the others to nearest.

    Raises:
        BadInput: a kept weight, or a scale, is beyond float16.
    """
    weight = weight.float()
    place = _place(_chosen(weight, format, importance), weight.shape[1])
    split = weight.shape[1] - format.columns(weight.shape[1])
    found = []
    for part, columns in ((format.base, place[:split]), (format.kept, place[split:])):
        h = None if importance is None else importance.to(weight.device)[columns]
        found.append(codec_of(part).round_to_nearest(weight[:, columns], part, h))
    return Columns(format, place, *found)


def _chosen(weight: Tensor, format: ColumnsFormat, importance: Tensor | None) -> Tensor:
    """Columns of the largest λ, ascending; of equal ones the first."""
    rounded = codec_of(format.base).round_to_nearest(weight, format.base, importance)
    loss = rounded.dequantize().sub_(weight).square_().sum(0)
    if importance is not None and float(importance.sum()) > 0:
        loss *= importance.to(weight.device)
    order = loss.argsort(descending=True, stable=True)
    return order[: format.columns(weight.shape[1])].sort().values


def _place(columns: Tensor, in_features: int) -> Tensor:
    """(in,) the other columns, then these."""
    others = torch.ones(in_features, dtype=torch.bool, device=columns.device)
    others[columns] = False
    return torch.cat([others.nonzero()[:, 0], columns])


def with_feedback(
    weight: Tensor, format: ColumnsFormat, importance: Tensor | None, moment: SecondMoment
) -> Columns:
    """Columns of the base in the order of the diagonal of G, then the kept ones likewise.

    Of each row, what is rounded to nearest is kept where its output error is less.

    Raises:
        BadInput: a kept weight, or a scale, is beyond float16.
    """
    weight = weight.float()
    plain = quantize(weight, format, importance)
    split = plain.rest.codes.shape[1]
    rest = replace(plain.rest, codes=torch.empty_like(plain.rest.codes))
    kept = replace(plain.kept, codes=torch.empty_like(plain.kept.codes))

    def round_column(values: Tensor, column: int) -> Tensor:
        part, start = (rest, 0) if column < split else (kept, split)
        nearest = codec_of(part.format).nearest
        assert nearest is not None
        part.codes[:, column - start], decoded = nearest(part, values, column - start)
        return decoded

    diagonal = moment.matrix.diagonal()[plain.place]
    parts = diagonal[:split], diagonal[split:]
    first, last = (part.argsort(descending=True, stable=True) for part in parts)
    order = torch.cat([first, split + last])
    upper = moment.factor(plain.place[order])
    feed_back(weight[:, plain.place], order.tolist(), upper, round_column)
    fed = replace(plain, rest=rest, kept=kept)
    worse = output_errors(weight, fed, moment) >= output_errors(weight, plain, moment)
    rest.codes[worse], kept.codes[worse] = plain.rest.codes[worse], plain.kept.codes[worse]
    return fed


CODEC = Codec(quantize, unpack, feed_back=with_feedback)
