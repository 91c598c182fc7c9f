"""Small random models of several families, cut into units and ready to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bitsearch.formats import parse_formats
from bitsearch.models.decoder import Decoder
from bitsearch.models.layout import find_layout
from bitsearch.objectives.damage.scoring import Scoring
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.quantizers.rtn import quantize
from bitsearch.units import ModelLayout, Unit

# All sizes differ, so that no axis can be taken for another.
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "cohere": LLAMA_LIKE | {"logit_scale": 0.25},
    "granite": LLAMA_LIKE | {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "gemma2": LLAMA_LIKE
    | {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": True,
    },
    "gemma3_text": LLAMA_LIKE | {"sliding_window": 4, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 40},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 256,
    },
    "qwen3_moe": LLAMA_LIKE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": LLAMA_LIKE | EXPERTS,
    "llama4_text": LLAMA_LIKE | EXPERTS | {"intermediate_size_mlp": 48},
    "gpt_oss": LLAMA_LIKE
    | EXPERTS
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
# Small enough for Hessians and for sums over all labels.
MINUTE: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


@dataclass(frozen=True)
class Case:
    """A model without gradients, cut into units, and a text.

    Attributes:
        model: a transformers model in eval mode.
        layout: its structure.
        decoder: the same model, cut at its blocks.
        tokens: (windows, length) random text.
    """

    model: Any
    layout: ModelLayout
    decoder: Decoder
    tokens: Tensor

    @property
    def units(self) -> tuple[Unit, ...]:
        """Every unit."""
        return self.layout.units

    def unit(self, name: str) -> Unit:
        """The unit whose name ends so."""
        (found,) = [unit for unit in self.units if unit.name.endswith(name)]
        return found

    def weights(self, cache_bytes: int = 1 << 30, **importance: Tensor) -> CandidateWeights:
        """Round-to-nearest candidates."""
        return CandidateWeights(self.model, quantize, importance, cache_bytes)

    def scoring(
        self, formats: str = "int3-g16,int5-g16-sym,bf16", seed: int = 0, tokens: Any = None
    ) -> Scoring:
        """The input of an estimator."""
        return Scoring(
            self.decoder,
            self.units,
            parse_formats(formats),
            self.weights(),
            self.tokens if tokens is None else tokens,
            seed,
        )

    def state(self) -> dict[str, Tensor]:
        """A copy of every parameter."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor | None = None) -> Tensor:
        """(windows, length, vocabulary) float64, by the model's own forward pass."""
        logits = self.model(input_ids=self.tokens if tokens is None else tokens).logits
        return logits.double().log_softmax(-1)


MakeCase = Callable[..., Case]


def make_case(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    windows: int = 3,
    length: int = 12,
    **changes: Any,
) -> Case:
    """A model with weights large enough for sharp, uneven predictions."""
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        family, **{"vocab_size": 48, **ends, **FAMILIES[family], **changes}
    )
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the fused one knows no float64
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() < 2:
            drawn = 0.1 * drawn + name.endswith("weight")  # of a norm
        else:
            drawn = drawn / min(parameter.shape[-2:]) ** 0.5
        parameter.copy_(drawn)
    layout = find_layout(model, reference="random")
    tokens = torch.randint(3, config.vocab_size, (windows, length), generator=generator)
    return Case(model, layout, Decoder(model, layout.blocks), tokens)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Products this small only wait for each other on several threads."""
    torch.set_num_threads(1)


@pytest.fixture
def case_of() -> MakeCase:
    """`make_case`."""
    return make_case


@pytest.fixture
def minute() -> MakeCase:
    """`make_case` with sizes for which everything can be enumerated."""

    def make(family: str = "llama", **changes: Any) -> Case:
        return make_case(family, **{"dtype": torch.float64, "length": 5, **MINUTE, **changes})

    return make


@pytest.fixture
def captured() -> Callable[[Case, Sequence[str]], dict[str, Tensor]]:
    """`capture`."""
    return capture


@torch.no_grad()
def capture(case: Case, modules: Sequence[str]) -> dict[str, Tensor]:
    """(tokens, in) inputs of modules on the case's text, by the model's own forward pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        case.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2).double()})
        )
        for name in modules
    ]
    case.model(input_ids=case.tokens)
    for hook in hooks:
        hook.remove()
    return seen
