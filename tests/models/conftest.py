"""Small random models of many families, and one written to disk with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 96
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# All sizes differ, so that no axis can be taken for another.
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE,
    "phi": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "qwen3_moe": LLAMA_LIKE | EXPERTS | {"num_experts": 4},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4},
    "olmoe": LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": LLAMA_LIKE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": LLAMA_LIKE | {"num_local_experts": 4, "intermediate_size_mlp": 48},
    "deepseek_v3": LLAMA_LIKE
    | EXPERTS
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "qwen2_moe": LLAMA_LIKE | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 28},
    "jamba": LLAMA_LIKE | {"num_experts": 4, "mamba_d_state": 4, "use_mamba_kernels": False},
}


def make_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration of a model type."""
    settings = {"vocab_size": VOCABULARY, **TOKENS, **FAMILIES[family], **changes}
    return AutoConfig.for_model(family, **settings)


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def make_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `size` words w3, w4, … after its special tokens."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, size))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every model type in turn."""
    return str(request.param)


@pytest.fixture
def config(family: str) -> PreTrainedConfig:
    """A small configuration of every model type in turn."""
    return make_config(family)


@pytest.fixture
def configured() -> Any:
    """`make_config`, for tests of one family."""
    return make_config


@pytest.fixture
def instantiate() -> Any:
    """`make_model`."""
    return make_model


@pytest.fixture
def tokenizer_of() -> Any:
    """`make_tokenizer`."""
    return make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random Llama with its tokenizer, as transformers writes it."""
    path = tmp_path / "model"
    make_model(make_config("llama", tie_word_embeddings=False)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
