"""float16, as the part of a format that is kept apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.quantizers.codec import Codec


@dataclass(frozen=True, slots=True)
class Halves:
    """An (out, in) matrix in float16.

    Attributes:
        format: fp16.
        codes: (out, in) float16, the values themselves.
    """

    format: Format
    codes: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the tensor."""
        return self.codes.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        return self.codes.float()

    def pack(self) -> dict[str, Tensor]:
        """The tensor as it is stored."""
        return {"values": self.codes.cpu().contiguous()}


def unpack(packed: dict[str, Tensor], format: Format, in_features: int) -> Halves:
    """The inverse of `Halves.pack`."""
    return Halves(format, packed["values"])


def halves(values: Tensor) -> Tensor:
    """Values rounded to float16.

    Raises:
        BadInput: one is too large.
    """
    found = values.half()
    if not torch.isfinite(found).all():
        raise BadInput(
            f"weights up to {float(values.abs().max()):.3g} cannot be kept apart, they are "
            "beyond float16; keep this matrix at 16 bits with --freeze"
        )
    return found


def quantize(weight: Tensor, format: Format, importance: Tensor | None = None) -> Halves:
    """Round an (out, in) matrix to float16.

    Raises:
        BadInput: a weight is too large.
    """
    return Halves(format, halves(weight))


def nearest(encoded: Halves, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """(out,) values in float16, twice."""
    codes = halves(values)
    return codes, codes.float()


CODEC = Codec(quantize, unpack, nearest)
