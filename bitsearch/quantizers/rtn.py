"""Round to nearest, with scales searched by least squares: each format in its own way."""

from __future__ import annotations

from torch import Tensor

from bitsearch.formats import Format
from bitsearch.quantizers.codec import Encoded, codec_of


def quantize(weight: Tensor, format: Format, importance: Tensor | None = None) -> Encoded:
    """Quantize an (out, in) matrix.

    Args:
        weight: (out, in), any float dtype, finite.
        format: any but a 16-bit one.
        importance: (in,) non-negative mean squares of the inputs, which weigh the error.

    Raises:
        BadInput: a scale is out of the format's range.
    """
    return codec_of(format).round_to_nearest(weight, format, importance)
