"""GPTQ: columns are rounded one after another, and the rest makes up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, section 3: with UᵀU = (G + λI)⁻¹, U upper triangular, the
error of column j, e = (w_j − ŵ_j) / U_jj, moves the columns k after it by −e·U_jk.

Columns come in the order of the diagonal of G. Scales and zero points are those of
`rtn`, found before anything moves, so that groups stay contiguous columns and the
stored layout is the same. Unlike the paper, inputs are those of the unquantized model:
a matrix in a format is then the same tensor in every policy.

Of each row, the codes of `rtn` are kept where their output error Tr(Δ G Δᵀ) is less:
damping and clipping can make the feedback lose. Cost: O(in³) once for a G, O(out · in²)
for each candidate. Gains little where inputs are uncorrelated, or calibration is short.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitsearch.errors import UsageError
from bitsearch.formats import Format
from bitsearch.quantizers.codec import Encoded, Nearest, codec_of
from bitsearch.quantizers.second_moment import SecondMoment

BLOCK = 128


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
    if codec.nearest is None:
        raise UsageError(
            f"quantizer 'gptq' cannot round into {format.name}: its scales are no stored tensor "
            "of their own; use --quantizer rtn, or int, table and lut formats"
        )
    plain: Any = codec.round_to_nearest(weight, format, importance)
    if moment is None:
        rounded: Encoded = plain
        return rounded
    weight = weight.float()
    fed = replace(plain, codes=_fed_back(weight, plain, codec.nearest, moment))
    better = output_errors(weight, fed, moment) < output_errors(weight, plain, moment)
    kept: Encoded = replace(plain, codes=torch.where(better[:, None], fed.codes, plain.codes))
    return kept


def output_errors(weight: Tensor, encoded: Encoded, moment: SecondMoment) -> Tensor:
    """(out,) δ G δᵀ of each row's error δ: mean square of the change of that output."""
    error = encoded.dequantize().sub_(weight)
    return (error @ moment.matrix).mul_(error).sum(1)


def _fed_back(weight: Tensor, plain: Encoded, nearest: Nearest, moment: SecondMoment) -> Tensor:
    """(out, in) codes, with the scales of `plain`."""
    order, upper = moment.feedback
    columns = order.tolist()
    left = weight.mT[order].contiguous()  # (in, out): what is still to be rounded
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for place in range(start, end):
            found, value = nearest(plain, left[place], columns[place])
            codes[:, columns[place]] = found
            error = (left[place] - value).div_(upper[place, place])
            left[place + 1 : end].addr_(upper[place, place + 1 : end], error, alpha=-1)
            errors[place - start] = error
        left[end:].addmm_(upper[start:end, end:].mT, errors, alpha=-1)
    return codes
