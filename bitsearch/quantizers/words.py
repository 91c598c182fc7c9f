"""Codes in 32-bit words, as most tools store them: low bit first, without gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def words(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) codes below 2^bits -> (rows, ceil(n·bits/32)) int32."""
    import numpy as np
    import torch

    from bitsearch.quantizers.quantized import pack_rows

    rows = pack_rows(codes.cpu().numpy(), bits)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(rows).view("<i4").astype(np.int32))


def codes_in(stored: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `words`: (rows, count) uint8."""
    import numpy as np
    import torch

    from bitsearch.quantizers.quantized import unpack_rows

    rows = np.ascontiguousarray(stored.cpu().numpy().astype("<i4"))
    return torch.from_numpy(unpack_rows(rows.view(np.uint8), bits, count))
