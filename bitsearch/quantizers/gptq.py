"""GPTQ: columns are rounded one after another, and the rest makes up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, section 3; the update is in `bitsearch.quantizers.feedback`.

Columns come in the order of the diagonal of G. Scales and zero points are those of
`rtn`, found before anything moves, so that groups stay contiguous columns and the
stored layout is the same. Unlike the paper, inputs are those of the unquantized model:
a matrix in a format is then the same tensor in every policy.

Of each row, the codes of `rtn` are kept where their output error Tr(Δ G Δᵀ) is less:
damping and clipping can make the feedback lose. Cost: O(in³) once for a G, O(out · in²)
for each candidate. Gains little where inputs are uncorrelated, or calibration is short.

Formats in two parts have an order of their own (`Codec.feed_back`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitsearch.errors import UsageError
from bitsearch.formats import Format
from bitsearch.quantizers.codec import Encoded, Nearest, codec_of
from bitsearch.quantizers.feedback import feed_back, output_errors
from bitsearch.quantizers.second_moment import SecondMoment


def quantize(
    weight: Tensor,
    format: Format,
    importance: Tensor | None = None,
    moment: SecondMoment | None = None,
) -> Encoded:
    """Error feedback through the second moment of the inputs, in order of activations.

    Args:
        weight: (out, in), any float dtype, finite.
        format: one whose values can be rounded column by column.
        importance: (in,) mean squares of the inputs, which weigh the search for scales.
        moment: of the inputs; None where they are not seen, which leaves `rtn`.

    Raises:
        UsageError: the format cannot be rounded column by column.
        BadInput: a scale is out of the format's range.
    """
    codec = codec_of(format)
    if codec.nearest is None and codec.feed_back is None:
        raise UsageError(
            f"quantizer 'gptq' cannot round into {format.name}: its scales are no stored tensor "
            "of their own; use --quantizer rtn, or int, table and lut formats"
        )
    if moment is None:
        return codec.round_to_nearest(weight, format, importance)
    if codec.feed_back is not None:
        return codec.feed_back(weight, format, importance, moment)
    assert codec.nearest is not None
    weight = weight.float()
    plain: Any = codec.round_to_nearest(weight, format, importance)
    fed = replace(plain, codes=_fed_back(weight, plain, codec.nearest, moment))
    better = output_errors(weight, fed, moment) < output_errors(weight, plain, moment)
    kept: Encoded = replace(plain, codes=torch.where(better[:, None], fed.codes, plain.codes))
    return kept


def _fed_back(weight: Tensor, plain: Any, nearest: Nearest, moment: SecondMoment) -> Tensor:
    """(out, in) codes, with the scales of `plain`."""
    order, upper = moment.feedback
    codes = torch.empty_like(plain.codes)

    def round_column(values: Tensor, column: int) -> Tensor:
        codes[:, column], decoded = nearest(plain, values, column)
        return decoded

    feed_back(weight, order.tolist(), upper, round_column)
    return codes
