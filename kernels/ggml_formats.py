"""Which of our formats a ggml block type executes exactly, and the blocks of a matrix.

GGUF formats are ggml's own. A symmetric integer of 4, 5 or 8 bits in groups of whole
blocks of 32 is `q4_0`, `q5_0` or `q8_0` with the group's scale in every block: the same
values, in ggml's bytes. Codes lie as ggml's `block_q4_0`, `block_q5_0` and `block_q8_0`:
a float16 scale, then (5 bits) the high bits in 32, then low nibbles of weight j and
j + 16 in one byte, or signed bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from bitsearch.formats import Format
from bitsearch.formats.gguf import BLOCKS, GgufFormat
from bitsearch.kernels.ggml import TYPES

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.codec import Encoded

BLOCK = 32
_OF_INTEGERS = {4: "q4_0", 5: "q5_0", 8: "q8_0"}


def type_of(format: Format) -> str | None:
    """The ggml type that executes a format; None if there is none."""
    if isinstance(format, GgufFormat):
        type = format.kind.removeprefix("gguf-")
        return type if type in TYPES else None
    if format.exact:
        return "f16" if format.kind == "fp16" else format.kind
    if format.kind == "int" and format.symmetric and (format.group_size or 1) % BLOCK == 0:
        return _OF_INTEGERS.get(format.bits)
    return None


def block_of(type: str) -> int:
    """Weights of a block of a ggml type."""
    name = f"gguf-{type}"
    return BLOCKS[name][1] if name in BLOCKS else 1


def decode(encoded: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """The float32 values of (rows, bytes) blocks, by the `gguf` library."""
    kind = GGMLQuantizationType[type.upper()]
    return np.asarray(dequantize(encoded, kind), np.float32)


def blocks(part: Encoded | Tensor, type: str) -> NDArray[np.uint8]:
    """An (out, in) matrix as ggml stores it, (out, bytes of a row).

    Args:
        part: in a format that the type executes; of a 16-bit format the weights.
        type: from `type_of`.
    """
    import torch

    if isinstance(part, torch.Tensor):
        sixteen = part.cpu().to(torch.bfloat16 if type == "bf16" else torch.float16)
        return sixteen.contiguous().view(torch.uint8).numpy()
    if isinstance(part.format, GgufFormat):
        return part.pack()["blocks"].numpy()
    integers: Any = part
    codes = integers.codes.cpu().numpy()
    size = part.format.group_size
    repeats = (size or codes.shape[1]) // BLOCK
    scales = integers.scales.cpu().numpy().repeat(repeats, axis=1)[:, : codes.shape[1] // BLOCK]
    head = scales[..., None].view(np.uint8)
    body = _BODIES[type](codes.reshape(len(codes), -1, BLOCK))
    return np.concatenate([head, body], axis=2).reshape(len(codes), -1)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low = codes & np.uint8(15)
    return low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << np.uint8(4)


def _five(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    high = np.packbits(codes >> 4, axis=2, bitorder="little")
    return np.concatenate([high, _nibbles(codes)], axis=2)


def _signed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes ^ np.uint8(128)  # code − 128 in two's complement


_BODIES: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "q4_0": _nibbles,
    "q5_0": _five,
    "q8_0": _signed,
}
