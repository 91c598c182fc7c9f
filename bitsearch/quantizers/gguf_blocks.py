"""GGUF block types: encoded by the `gguf` library where it can, K and IQ4 types by our search.

Whatever encodes, the library decodes: values are what llama.cpp's own reader gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as library_dequantize
from gguf.quants import quantize as library_quantize
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats.gguf import BLOCKS, GgufFormat
from bitsearch.quantizers import gguf_iq, gguf_k
from bitsearch.quantizers.codec import Codec

_ENCODERS = {**gguf_k.ENCODERS, **gguf_iq.ENCODERS}
_ROWS = 1 << 20  # weights encoded at a time


@dataclass(frozen=True, slots=True)
class Blocks:
    """An (out, in) matrix as ggml stores it.

    Attributes:
        format: the block type.
        blocks: (out, bytes of a row) uint8, on the CPU.
        device: where values are wanted.
    """

    format: GgufFormat
    blocks: Tensor
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.nbytes

    def dequantize(self) -> Tensor:
        """(out, in) float32 values, by the `gguf` library."""
        values = library_dequantize(self.blocks.numpy(), ggml_type(self.format))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.device)

    def pack(self) -> dict[str, Tensor]:
        """The blocks, as a GGUF file holds them."""
        return {"blocks": self.blocks}


def ggml_type(format: GgufFormat) -> GGMLQuantizationType:
    """The library's name of a format."""
    return GGMLQuantizationType[format.kind.removeprefix("gguf-").upper()]


def quantize(weight: Tensor, format: GgufFormat, importance: Tensor | None = None) -> Blocks:
    """Encode an (out, in) matrix.

    The K and IQ4 types weigh the error by the importance of the inputs, as llama.cpp does
    with an importance matrix; the library's own encoders take none.

    Raises:
        BadInput: rows are no whole blocks.
    """
    if not format.fits(weight.shape[1]):
        raise BadInput(
            f"{format.name} needs rows of whole blocks of {format.block} weights, not "
            f"{weight.shape[1]}; take another format for this matrix"
        )
    if format.kind in _ENCODERS:
        encode, size = _ENCODERS[format.kind], format.block
        h = torch.ones(weight.shape[1]) if importance is None else importance.float()
        h = h.to(weight.device).clamp(min=float(h.mean()) * 1e-6 or 1.0)
        rows = max(1, _ROWS // weight.shape[1])
        parts = [
            encode(
                part.float().reshape(-1, size), h.reshape(-1, size).repeat(len(part), 1)
            ).reshape(len(part), -1)
            for part in weight.split(rows)
        ]
        blocks = torch.cat(parts).cpu()
    else:
        encoded = library_quantize(weight.float().cpu().numpy(), ggml_type(format))
        blocks = torch.from_numpy(encoded)
    return Blocks(format, blocks.contiguous(), weight.device)


def unpack(packed: dict[str, Tensor], format: GgufFormat, in_features: int) -> Blocks:
    """The inverse of `Blocks.pack`."""
    return Blocks(format, packed["blocks"], torch.device("cpu"))


CODEC = Codec(quantize, unpack)
__all__ = ["BLOCKS", "CODEC", "Blocks", "quantize", "unpack"]
