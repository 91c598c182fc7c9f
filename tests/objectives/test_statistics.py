"""Input statistics equal means over inputs that were captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bitsearch.objectives.statistics import input_mean_squares


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "phi3", "qwen3_moe"])
def test_mean_squares_equal_those_of_captured_inputs(
    family: str, case_of: Any, captured: Any
) -> None:
    case = case_of(family, dtype=torch.float64)
    means, counts = input_mean_squares(case.decoder, case.units, case.tokens)
    watched = [
        matrix
        for unit in case.units
        for matrix in unit.matrices
        if unit.kind != "embedding" and matrix.role != "experts.down"
    ]
    inputs = captured(case, [matrix.module for matrix in watched])
    for matrix in watched:
        expected = inputs[matrix.module].square().mean(0)
        assert means[matrix.name].dtype == torch.float32
        assert torch.allclose(means[matrix.name].double(), expected, rtol=1e-5)
    assert {count for count in counts.values()} == {case.tokens.numel()}


def test_tied_embedding_is_seen_as_head(case_of: Any, captured: Any) -> None:
    case = case_of("gemma2", dtype=torch.float64)
    means, counts = input_mean_squares(case.decoder, case.units[:1], case.tokens)
    expected = captured(case, ["lm_head"])["lm_head"].square().mean(0)
    assert torch.allclose(means["model.embed_tokens.weight"].double(), expected, rtol=1e-5)
    assert counts == {"model.embed_tokens": case.tokens.numel()}


def test_untied_embedding_has_no_input(case_of: Any) -> None:
    case = case_of()
    means, counts = input_mean_squares(case.decoder, case.units[:1], case.tokens)
    assert means == {} and counts == {}


def test_inside_of_experts_is_not_seen(case_of: Any) -> None:
    """Not even where the experts are as wide as the model, as in gpt-oss."""
    case = case_of("gpt_oss", intermediate_size=32)
    means, counts = input_mean_squares(case.decoder, case.units, case.tokens)
    (down,) = [u for u in case.units if u.block == 0 and u.matrices[0].role == "experts.down"]
    (up,) = [u for u in case.units if u.block == 0 and u.matrices[0].role == "experts.gate_up"]
    assert down.matrices[0].in_features == case.model.config.hidden_size
    assert up.matrices[0].name in means and counts[up.name] == case.tokens.numel()
    assert down.matrices[0].name not in means and down.name not in counts


def test_expert_that_no_token_reaches_counts_zero(case_of: Any) -> None:
    """A layer that is skipped, or called with no token, has no mean, and no NaN."""
    case = case_of()
    skipped, empty = case.unit("layers.1.self_attn.o_proj"), case.unit("layers.2.mlp.down_proj")
    attention = case.model.get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    mlp = case.model.get_submodule("model.layers.2.mlp")

    class Empty(nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            mlp.down_proj(state.new_zeros(0, 40))
            return state

    case.model.get_submodule("model.layers.2").mlp.forward = Empty().forward
    means, counts = input_mean_squares(case.decoder, case.units, case.tokens)
    for unit in (skipped, empty):
        assert counts[unit.name] == 0
        assert unit.matrices[0].name not in means
    assert all(mean.isfinite().all() for mean in means.values())
    reached = case.unit("layers.1.mlp.down_proj")
    assert counts[reached.name] == case.tokens.numel()
