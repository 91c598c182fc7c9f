"""The decoder that CUDA graphs hold, run on the processor, against transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from bitsearch.kernels.cuda_decoder import TorchDecoder
from bitsearch.kernels.devices import Launch
from bitsearch.kernels.regime import Regime
from bitsearch.models.decoder_shape import decoder_shape
from bitsearch.models.layout import find_layout
from bitsearch.models.weights import read_weight
from bitsearch.units import Unit

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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 24},
}


class Processor:
    """Dense products in float32: all that a decoder asks of its device."""

    place, dtype = "cpu", "float32"

    def linear(self, launch: Launch, parts: Sequence[Tensor]) -> Any:
        weight = torch.cat(list(parts))
        assert weight.shape == (launch.n, launch.k)
        return lambda x: linear(x, weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    layout = find_layout(model, reference=family)
    shape = decoder_shape(layout, config)

    def units(unit: Unit) -> tuple[str, list[Tensor]]:
        return "fp16", [read_weight(model, matrix) for matrix in unit.matrices]

    def vectors(name: str) -> Any:
        return model.get_parameter(name).detach().numpy()

    device: Any = Processor()
    ids = torch.randint(3, 96, (1, 20))
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    prompt = TorchDecoder(device, shape, units, vectors, Regime("prefill", 1, 20))
    prompt.ids.copy_(ids)
    assert (prompt.step() - expected).abs().max() < 1e-4 * expected.abs().max()
    last = TorchDecoder(device, shape, units, vectors, Regime("decode", 1, 20))
    for (keys, values), (seen_keys, seen_values) in zip(last.cache, prompt.cache, strict=True):
        keys[:, :, :19] = seen_keys[:, :, :19]
        values[:, :, :19] = seen_values[:, :, :19]
    last.ids.copy_(ids[:, 19:])
    assert (last.step() - expected).abs().max() < 1e-4 * expected.abs().max()
