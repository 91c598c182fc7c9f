"""Weights that another tool quantized: their values, taken as they are.

What they weigh is what the named format weighs, so they must be values that it can hold:
a group with more different values than it has codes is refused. That shows what is not
quantized, or with other bits or groups; not where scales have more bits than the format's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.formats.split import SplitFormat
from bitsearch.quantizers.grouped import by_group


@dataclass(frozen=True, slots=True)
class External:
    """The values of an (out, in) matrix.

    Attributes:
        format: what they are said to be in.
        values: (out, in), any float dtype.
    """

    format: Format
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the values."""
        return self.values.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32 copy."""
        return self.values.to(torch.float32, copy=True)

    def pack(self) -> NoReturn:
        """Not possible: only values are known, not their codes and scales.

        Raises:
            BadInput: always.
        """
        raise BadInput(
            f"weights in {self.format.name} come from another tool, whose codes are not known: "
            "they cannot be packed, only written at 16 bits"
        )


def read_back(values: Tensor, format: Format, name: str) -> External:
    """Check that values may be those of a format.

    Args:
        values: (out, in).
        format: what they are said to be in.
        name: of the matrix, for the message.

    Raises:
        BadInput: they are not finite, or more different ones than the format can hold.
    """
    if not bool(values.isfinite().all()):
        raise BadInput(f"{name} holds NaN or infinite values in the weights for {format.name}")
    size, codes = format.group_size or values.shape[1], 2**format.bits
    if size > codes and not isinstance(format, SplitFormat):
        most = int(by_group(values, None, size, _different)[1].max())
        if most > codes:
            raise BadInput(
                f"{name} is not in {format.name}: one of its groups holds {most} different "
                f"values, and the format {codes}; name the format that the weights are in"
            )
    return External(format, values)


def _different(groups: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, and how many different ones each group holds."""
    return groups, (groups.sort(-1).values.diff(dim=-1) != 0).sum(-1) + 1
