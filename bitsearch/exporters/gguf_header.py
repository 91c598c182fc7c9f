"""The metadata of a GGUF file: what llama.cpp must know about a model besides its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_FACTORS = "rope_freqs.weight"
_GEMMA_PATTERN = 6  # every sixth layer sees all positions; llama.cpp knows no other


def add_model(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """Add the sizes and constants of a model.

    Args:
        writer: of the file, made for the model's architecture.
        config: of the model, of one of `gguf_names.FAMILIES`.

    Returns:
        (head_dim / 2,) factors of the rotary frequencies, to be stored as the tensor
        `ROPE_FACTORS`; None where there are none.

    Raises:
        BadInput: llama.cpp computes something that this configuration says in another way.
    """
    c: Any = config
    _check(c)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(head)
    if experts := getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        if width := getattr(c, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(width)
    if c.model_type == "gemma3_text":
        writer.add_sliding_window(c.sliding_window)
    return _rope(writer, c.rope_parameters, head)


def _check(c: Any) -> None:
    """Refuse what llama.cpp's graph of the architecture does not do."""
    kind, activation = c.model_type, getattr(c, "hidden_act", None) or c.hidden_activation
    expected = {"gemma3_text": "gelu_pytorch_tanh"}.get(kind, "silu")
    if activation != expected:
        raise BadInput(f"llama.cpp's {kind} computes {expected}, not {activation}")
    window = getattr(c, "sliding_window", None)
    layers = getattr(c, "layer_types", None) or []
    if kind == "gemma3_text":
        period = [
            "full_attention" if (i + 1) % _GEMMA_PATTERN == 0 else "sliding_attention"
            for i in range(c.num_hidden_layers)
        ]
        if list(layers) != period or c.final_logit_softcapping or c.attn_logit_softcapping:
            raise BadInput("llama.cpp's gemma3 has another pattern of layers or soft caps")
        if c.query_pre_attn_scalar != c.head_dim:
            raise BadInput("llama.cpp's gemma3 divides attention by the square root of head_dim")
    elif window and (not layers or "sliding_attention" in layers):
        raise BadInput(f"llama.cpp's {kind} has no sliding window of {window}")
    if kind == "qwen3_moe" and (not c.norm_topk_prob or c.mlp_only_layers):
        raise BadInput("llama.cpp's qwen3moe normalizes the weights of all experts, in all layers")


def _rope(
    writer: gguf.GGUFWriter, rope: Mapping[str, Any], head: int
) -> NDArray[np.float32] | None:
    """Rotary embeddings; the local ones of sliding layers apart."""
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        if local["rope_type"] != "default":
            raise BadInput(f"sliding layers with rotary type {local['rope_type']}")
        writer.add_rope_freq_base_swa(local["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "default":
            return None
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
            return None
        case "llama3":
            return _llama3_factors(rope, head)
    raise BadInput(f"rotary embeddings of type '{rope['rope_type']}' are not written to GGUF here")


def _llama3_factors(rope: Mapping[str, Any], head: int) -> NDArray[np.float32]:
    """Divisors of the rotary frequencies, (head / 2,), as Llama 3.1 scales its context.

    Wavelengths λ below `original/high` stay, those above `original/low` are divided by
    `factor`, and between them the divisor is interpolated:
    1 / ((1 − t)/factor + t) with t = (original/λ − low) / (high − low).
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = np.arange(0, head, 2, dtype=np.float64) / head
    turns = rope["original_max_position_embeddings"] / (
        2 * math.pi * rope["rope_theta"] ** exponents
    )
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.astype(np.float32)
