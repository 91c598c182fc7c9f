"""The codec of each format: how weights become codes, and codes bytes.

Other packages add theirs under the entry-point group `bitsearch.codecs`, by kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from bitsearch import registry
from bitsearch.formats import Format, gguf, levels
from bitsearch.quantizers.second_moment import SecondMoment

GROUP = "bitsearch.codecs"

CODECS = {
    "int": "bitsearch.quantizers.integer:CODEC",
    "affine": "bitsearch.quantizers.affine:CODEC",
    "bilevel": "bitsearch.quantizers.bilevel:CODEC",
    "fp16": "bitsearch.quantizers.halves:CODEC",
    **dict.fromkeys(levels.TABLES, "bitsearch.quantizers.levelled:CODEC"),
    "lut": "bitsearch.quantizers.codebook:CODEC",
    "dialect4": "bitsearch.quantizers.dialect:CODEC",
    "columns": "bitsearch.quantizers.columns:CODEC",
    "sparse": "bitsearch.quantizers.sparse:CODEC",
    **dict.fromkeys(gguf.BLOCKS, "bitsearch.quantizers.gguf_blocks:CODEC"),
}


class Encoded(Protocol):
    """A quantized (out, in) matrix."""

    @property
    def format(self) -> Format:
        """What it is encoded in."""

    @property
    def nbytes(self) -> int:
        """Memory it takes here; `Format.bytes` is what it takes on disk."""

    def dequantize(self) -> Tensor:
        """(out, in) float32 values, exactly those that the packed tensors decode to."""

    def pack(self) -> dict[str, Tensor]:
        """The tensors as they are stored; their bytes sum to `Format.bytes`."""


Nearest = Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Codec:
    """What a file of this package offers for one family of formats.

    Attributes:
        round_to_nearest: (weight, format, importance) -> encoded matrix; see
            `bitsearch.quantizers.rtn.quantize`.
        unpack: (packed tensors, format, input columns) -> encoded matrix, the
            inverse of `Encoded.pack`.
        nearest: (encoded matrix, (out,) values, column) -> (out,) codes nearest to the
            values in that column, and what they decode to, with the scales as they are.
            The matrix is a dataclass with (out, in) `codes`. None if codes cannot be
            chosen one by one.
        feed_back: of a format in two parts: (weight, format, importance, second moment)
            -> encoded matrix, errors fed back from part to part, no row's output error
            greater than without. None for the others.
    """

    round_to_nearest: Callable[[Tensor, Any, Tensor | None], Encoded]
    unpack: Callable[[dict[str, Tensor], Any, int], Encoded]
    nearest: Nearest | None = None
    feed_back: Callable[[Tensor, Any, Tensor | None, SecondMoment], Encoded] | None = None


def codec_of(format: Format) -> Codec:
    """The codec of a format."""
    return cast(Codec, registry.load(GROUP, CODECS, format.kind))
