"""Whole decoders on ggml against transformers, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from bitsearch.errors import BadInput
from bitsearch.kernels.ggml import Backend
from bitsearch.kernels.ggml_decoder import GgmlDecoder
from bitsearch.models.decoder_shape import decoder_shape
from bitsearch.models.layout import find_layout
from bitsearch.models.weights import read_weight
from bitsearch.units import ModelLayout, Unit

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-rope": {"rope_parameters": LLAMA3},
    "llama-bias": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 24},
}


def make(family: str, fuse: bool = True) -> tuple[Any, ModelLayout, Any]:
    """A random model of a family, its layout and configuration."""
    torch.manual_seed(0)
    options = {"tie_word_embeddings": True} | SIZES | FAMILIES[family]
    config = AutoConfig.for_model(family.partition("-")[0], **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())
    return model, find_layout(model, reference=family, fuse=fuse), config


def decoder_of(
    model: Any, layout: ModelLayout, config: Any, *, batch: int, context: int
) -> GgmlDecoder:
    """The model on ggml, in float16."""

    def weights(unit: Unit) -> tuple[str, NDArray[np.uint8]]:
        rows = torch.cat([read_weight(model, matrix) for matrix in unit.matrices])
        return "f16", rows.half().numpy().view(np.uint8)

    vectors: Callable[[str], NDArray[np.float32]] = lambda name: (  # noqa: E731
        model.get_parameter(name).detach().numpy()
    )
    shape = decoder_shape(layout, config)
    return GgmlDecoder(Backend(1), shape, weights, vectors, batch, context)


@pytest.mark.parametrize(
    ("family", "fuse"),
    [
        *((family, True) for family in FAMILIES),
        *((family, False) for family in ("llama", "qwen2", "gemma3_text")),
    ],
)
def test_logits_are_those_of_transformers(family: str, fuse: bool) -> None:
    model, layout, config = make(family, fuse)
    decoder = decoder_of(model, layout, config, batch=2, context=20)
    ids = np.random.default_rng(0).integers(3, 96, (2, 20))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    size = np.abs(expected).max()
    # A prompt, then token by token, then several tokens at once after the prompt.
    prompt = decoder.step(12, 0).run(ids[:, :12])
    assert np.abs(prompt - expected[:, 11]).max() < 0.01 * size
    for position in range(12, 20):
        found = decoder.step(1, position).run(ids[:, position : position + 1])
        assert np.abs(found - expected[:, position]).max() < 0.01 * size
    found = decoder.step(5, 12).run(ids[:, 12:17])
    assert np.abs(found - expected[:, 16]).max() < 0.01 * size


def test_a_step_beyond_the_cache_is_refused() -> None:
    decoder = decoder_of(*make("llama"), batch=1, context=8)
    with pytest.raises(ValueError, match="in a cache of 8"):
        decoder.step(1, 8)


def test_other_decoders_are_refused_by_name() -> None:
    config = AutoConfig.for_model("phi", **{k: v for k, v in SIZES.items() if k != "head_dim"})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInput, match="model type 'phi' has no decoder of our own"):
        decoder_shape(find_layout(model, reference="phi"), config)
    model, layout, config = make("llama")
    config.hidden_act = "relu"
    with pytest.raises(BadInput, match="uses relu, which our decoder does not compute"):
        decoder_shape(layout, config)
