"""The tensors of GPTQ checkpoints, which GPTQModel, AutoRound, vLLM and SGLang read.

Codes fill 32-bit words down the columns of the transposed matrix, low bit first; of two,
three, four and eight bits. Other widths have a layout of GPTQModel's own, which the
engines do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitsearch.exporters.fit import linear_refusal
from bitsearch.formats import Format
from bitsearch.formats.integer import IntFormat
from bitsearch.policy import PolicyModule
from bitsearch.quantizers.words import words

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.quantized import Quantized

BITS = (2, 3, 4, 8)


def refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why the layout does not hold a tensor in a format."""
    rows, columns = module.shape
    if format.exact:
        return ""
    if not isinstance(format, IntFormat) or format.bits not in BITS:
        return f"only integers of {', '.join(map(str, BITS))} bits are written"
    if reason := linear_refusal(tensor, module, format):
        return reason
    if rows % 32 or columns % 32:
        return f"{rows} × {columns} is not a multiple of 32"
    return ""


def packing(offset: int, group_index: bool) -> Callable[[str, Quantized], dict[str, Tensor]]:
    """A function (module name, matrix) -> stored tensors.

    Args:
        offset: subtracted from zero points: 1 in the first version of the layout, where a
            zero point of 0 cannot be told from one of 2^bits; 0 in the second.
        group_index: whether the group of each column is stored.
    """

    def packed(name: str, quantized: Quantized) -> dict[str, Tensor]:
        import torch

        format = quantized.format
        columns = quantized.codes.shape[1]
        zeros = quantized.zeros.T.contiguous() - offset
        found = {
            f"{name}.qweight": words(quantized.codes, format.bits).T.contiguous(),
            f"{name}.qzeros": words(zeros, format.bits),
            f"{name}.scales": quantized.scales.cpu().T.contiguous(),
        }
        if group_index:
            index = torch.arange(columns, dtype=torch.int32) // (format.group_size or columns)
            found[f"{name}.g_idx"] = index
        return found

    return packed
