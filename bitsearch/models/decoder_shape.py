"""The shape of a decoder of the Llama kind, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from bitsearch.errors import BadInput
from bitsearch.kernels.decoder_shape import Block, DecoderShape
from bitsearch.units import ModelLayout, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LLAMA = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_HEADS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
# The norms of each family's blocks, by what stands behind them.
FAMILIES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _HEADS,
    "gemma3_text": _HEADS
    | {
        "attention": "input_layernorm",
        "after_attention": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    },
}
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


def decoder_shape(layout: ModelLayout, config: PreTrainedConfig) -> DecoderShape:
    """What the decoder computes, with the units of a layout.

    Raises:
        BadInput: it is of another family, or does something beyond it.
    """
    text: Any = config.get_text_config(decoder=True)
    if layout.model_type not in FAMILIES:
        raise BadInput(
            f"model type '{layout.model_type}' has no decoder of our own; there are "
            f"{', '.join(FAMILIES)}"
        )
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    beyond = [name for name in ("attn_logit_softcapping", "final_logit_softcapping")
              if getattr(text, name, None)]  # fmt: skip
    if activation not in _ACTIVATIONS or beyond:
        raise BadInput(f"{layout.reference} uses {', '.join(beyond) or activation}, which our "
                       "decoder does not compute")  # fmt: skip
    gemma = layout.model_type == "gemma3_text"
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    scale = text.query_pre_attn_scalar if gemma else head_dim
    matrices = {m.name for unit in layout.units for m in unit.matrices}
    biases = {f"{name.removesuffix('.bias')}.weight": name
              for name in layout.kept if name.endswith(".bias")}  # fmt: skip
    if not biases.keys() <= matrices:
        raise BadInput(f"{layout.reference} has biases outside of its linear layers, which our "
                       "decoder does not compute")  # fmt: skip
    norms = FAMILIES[layout.model_type]
    ends = {unit.kind: unit for unit in layout.units if unit.block is None}
    body = layout.blocks[0].rpartition(".")[0].rpartition(".")[0]
    return DecoderShape(
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        activation=_ACTIVATIONS[activation],
        epsilon=text.rms_norm_eps,
        norm_offset=1.0 if gemma else 0.0,
        attention_scale=scale**-0.5,
        embedding_scale=text.hidden_size**0.5 if gemma else 1.0,
        blocks=tuple(
            Block(
                _roles(layout, index),
                {role: f"{block}.{norm}.weight" for role, norm in norms.items()},
                _window(text, index),
                *_rotary(text, index),
            )
            for index, block in enumerate(layout.blocks)
        ),
        norm=f"{body}.norm.weight",
        embedding=ends["embedding"],
        head=ends.get("head", ends["embedding"]),
        biases=biases,
    )


def _roles(layout: ModelLayout, block: int) -> dict[str, Unit]:
    """The block's units by the roles of their matrices."""
    roles = {
        matrix.role.rpartition(".")[2]: unit
        for unit in layout.units
        if unit.block == block
        for matrix in unit.matrices
    }
    if set(roles) != {"q", "k", "v", "o", "gate", "up", "down"}:
        raise BadInput(
            f"block {block} of {layout.reference} has other matrices ({', '.join(roles)}) than "
            "a Llama decoder"
        )
    return roles


def _window(text: Any, block: int) -> int | None:
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return text.sliding_window if kinds[block] == "sliding_attention" else None
    window: int | None = getattr(text, "sliding_window", None)
    return window if getattr(text, "use_sliding_window", True) else None


def _rotary(text: Any, block: int) -> tuple[Any, float]:
    """Frequencies of a block's rotary embedding, and the factor of sines and cosines.

    By transformers' own functions, so that every way of scaling is the model's.
    """
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, options = text.rope_parameters, {}
    if "rope_theta" not in parameters:  # one set of parameters for each type of layer
        options = {"layer_type": text.layer_types[block]}
        parameters = parameters[options["layer_type"]]
    kind = parameters["rope_type"]
    if kind != "default":
        made: Any = ROPE_INIT_FUNCTIONS[kind]
        frequencies, factor = made(text, torch.device("cpu"), **options)
        return frequencies.float().numpy(), float(factor)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    steps = np.arange(0, dim, 2) / dim
    return (1.0 / parameters["rope_theta"] ** steps).astype(np.float32), 1.0
