"""Matrices can be read and written, however the model stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from bitsearch.models import find_units, read_weight, write_weight
from bitsearch.units import Matrix

Make = Callable[..., Any]


def matrices(model: Any) -> list[Matrix]:
    return [matrix for unit in find_units(model) for matrix in unit.matrices]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_back_what_was_read_changes_no_bit(
    config: PreTrainedConfig, instantiate: Make, dtype: torch.dtype
) -> None:
    model = instantiate(config).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for matrix in matrices(model):
        value = read_weight(model, matrix)
        assert value.shape == (matrix.count * matrix.out_features, matrix.in_features)
        assert value.dtype == torch.float32
        write_weight(model, matrix, value.clone().zero_())
        assert not model.get_parameter(matrix.name).any()
        write_weight(model, matrix, value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_rows_are_outputs_of_a_linear_layer(config: PreTrainedConfig, instantiate: Make) -> None:
    model = instantiate(config)
    for unit in find_units(model):
        if unit.kind not in ("linear", "fused"):
            continue
        for matrix in unit.matrices:
            module = model.get_submodule(matrix.module)
            new = torch.randn(matrix.out_features, matrix.in_features)
            write_weight(model, matrix, new)
            inputs = torch.randn(5, matrix.in_features)
            bias = module.bias if module.bias is not None else 0.0
            torch.testing.assert_close(module(inputs), inputs @ new.T + bias)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"], indirect=True)
def test_rows_of_experts_are_outputs_expert_by_expert(
    family: str, config: PreTrainedConfig, instantiate: Make
) -> None:
    model = instantiate(config)
    gate_up, down = (m for m in matrices(model) if m.name.startswith("model.layers.0.mlp.experts"))
    experts = model.get_submodule(gate_up.module)
    w1 = read_weight(model, gate_up).reshape(gate_up.count, -1, gate_up.in_features)
    w2 = read_weight(model, down).reshape(down.count, -1, down.in_features)
    inputs = torch.randn(3, gate_up.in_features)
    for expert in range(gate_up.count):
        index = torch.full((3, 1), expert)
        with torch.no_grad():
            found = experts(inputs, index, torch.ones(3, 1))
        both = inputs @ w1[expert].T
        if family == "gpt_oss":
            # gate and up are interleaved; clamping does not bite on small values
            gate, up = both[:, ::2], both[:, 1::2]
            middle = (up + 1) * gate * torch.sigmoid(gate * 1.702)
        else:
            gate, up = both.chunk(2, dim=-1)
            middle = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(found, middle @ w2[expert].T, rtol=1e-4, atol=1e-5)


def test_reading_gives_a_copy(configured: Make, instantiate: Make) -> None:
    model = instantiate(configured("llama"))
    matrix = matrices(model)[1]
    before = model.get_parameter(matrix.name).clone()
    read_weight(model, matrix).zero_()
    assert torch.equal(model.get_parameter(matrix.name), before)


def test_tied_head_follows_the_embedding(configured: Make, instantiate: Make) -> None:
    model = instantiate(configured("llama", tie_word_embeddings=True))
    embedding = matrices(model)[0]
    new = torch.randn(embedding.out_features, embedding.in_features)
    write_weight(model, embedding, new)
    assert torch.equal(model.lm_head.weight, new)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_shape_is_refused_not_broadcast(configured: Make, instantiate: Make) -> None:
    model = instantiate(configured("llama"))
    matrix = matrices(model)[1]
    with pytest.raises(ValueError, match=matrix.name):
        write_weight(model, matrix, torch.zeros(1, matrix.in_features))
