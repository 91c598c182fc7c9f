"""Rounding column by column, where the columns still to come make up for each error.

Frantar et al., "GPTQ", ICLR 2023, section 3: with UᵀU = (G + λI)⁻¹, U upper triangular,
the error of column j, e = (w_j − ŵ_j) / U_jj, moves the columns k after it by −e·U_jk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitsearch.quantizers.codec import Encoded
from bitsearch.quantizers.second_moment import SecondMoment

BLOCK = 128


def feed_back(
    weight: Tensor,
    order: Sequence[int],
    upper: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
) -> None:
    """Round every column of a matrix, each after those before it in the order.

    Args:
        weight: (out, in) float32; left as it is.
        order: all columns.
        upper: (in, in) factor U of the columns in that order.
        round_column: takes (out,) values and their column, notes their codes, and
            returns what these decode to.
    """
    left = weight.mT[list(order)].contiguous()  # (in, out): what is still to be rounded
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for place in range(start, end):
            value = round_column(left[place], order[place])
            error = (left[place] - value).div_(upper[place, place])
            left[place + 1 : end].addr_(upper[place, place + 1 : end], error, alpha=-1)
            errors[place - start] = error
        left[end:].addmm_(upper[start:end, end:].mT, errors, alpha=-1)


def output_errors(weight: Tensor, encoded: Encoded, moment: SecondMoment) -> Tensor:
    """(out,) δ G δᵀ of each row's error δ: mean square of the change of that output."""
    error = encoded.dequantize().sub_(weight)
    return (error @ moment.matrix).mul_(error).sum(1)
