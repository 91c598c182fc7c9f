"""What a decoder of the Llama kind computes, for a runtime of its own.

Blocks of attention and a gated MLP, each behind an RMS norm: Llama, Mistral, Qwen 2
and 3, Gemma 3. Plain data, read from a configuration by `models.decoder_shape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitsearch.units import Unit


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block.

    Attributes:
        units: its units by what they compute; of a fused set each role names the unit.
        norms: parameter names of its RMS norms: `attention` and `mlp` before these,
            `q` and `k` on heads, `after_attention` and `after_mlp` before the residual.
        window: keys that a query sees, its own included; None for all.
        frequencies: (head_dim / 2,) radians a token of the rotary embedding.
        rotary_scale: factor of its sines and cosines.
    """

    units: Mapping[str, Unit]
    norms: Mapping[str, str]
    window: int | None
    frequencies: NDArray[np.float32]
    rotary_scale: float


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The whole decoder.

    Attributes:
        width: of the hidden state.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
        activation: of the gate.
        epsilon: of every norm.
        norm_offset: added to every norm's weight.
        attention_scale: factor of queries · keys.
        embedding_scale: factor of the embedding.
        blocks: in forward order.
        norm: parameter name of the last norm.
        embedding: unit of the token embedding.
        head: unit of the output embedding; that of the embedding if they are tied.
        biases: parameter names of biases by matrix name.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: Literal["silu", "gelu"]
    epsilon: float
    norm_offset: float
    attention_scale: float
    embedding_scale: float
    blocks: tuple[Block, ...]
    norm: str
    embedding: Unit
    head: Unit
    biases: Mapping[str, str]

    def kv_bytes(self, context: int, batch: int) -> int:
        """Bytes of keys and values in float16 that one step reads."""
        seen = sum(min(context, block.window or context) for block in self.blocks)
        return 2 * 2 * self.kv_heads * self.head_dim * seen * batch
