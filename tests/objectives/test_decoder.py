"""Restarting from a block is the same as running the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from bitsearch.errors import BadInput
from bitsearch.models.decoder import Decoder

FAMILIES = [
    "llama",
    "phi3",
    "bloom",
    "cohere",
    "granite",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt",
    "qwen3_moe",
    "mixtral",
    "llama4_text",
    "gpt_oss",
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_models_own(family: str, case_of: Any) -> None:
    case = case_of(family)
    found = case.decoder.logits(case.decoder.hidden(case.tokens))
    assert torch.allclose(found, case.model(input_ids=case.tokens).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_restart_equals_whole_forward(family: str, case_of: Any) -> None:
    case = case_of(family)
    plain = case.decoder.hidden(case.tokens)
    entering, last = case.decoder.record(case.tokens)
    assert len(entering) == 3
    assert torch.equal(last, plain)
    for start, state in enumerate(entering):
        assert torch.equal(case.decoder.hidden(case.tokens, start=start, entering=state), plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_restart_sees_its_state_and_no_earlier_block(family: str, case_of: Any) -> None:
    case = case_of(family)
    entering, last = case.decoder.record(case.tokens)
    for block in case.decoder.blocks[:2]:
        for parameter in block.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(case.decoder.hidden(case.tokens, start=2, entering=entering[2]), last)
    moved = entering[2].clone()
    moved[:, 0, 0] += 1
    found = case.decoder.hidden(case.tokens, start=2, entering=moved)
    assert not torch.isclose(found, last).all(-1).any(0)[0]


@torch.no_grad()
def test_sliding_windows_hide_old_tokens_after_a_restart(case_of: Any) -> None:
    """With windows of 4 the last of 3 blocks cannot see the first of 12 tokens."""
    case = case_of("gemma3_text", layer_types=["sliding_attention"] * 3)
    entering, last = case.decoder.record(case.tokens)
    moved = entering[2].clone()
    moved[:, 0] += 1
    found = case.decoder.hidden(case.tokens, start=2, entering=moved)
    assert torch.equal(found[:, 4:], last[:, 4:])
    assert not torch.isclose(found[:, 1:4], last[:, 1:4]).all()


@torch.no_grad()
def test_model_is_whole_again_after_a_failure(case_of: Any) -> None:
    case = case_of()
    plain = case.decoder.hidden(case.tokens)
    with pytest.raises(RuntimeError):
        case.decoder.hidden(case.tokens, start=1, entering=torch.zeros(1, 2, 5))
    assert torch.equal(case.decoder.hidden(case.tokens), plain)
    assert torch.equal(case.model.model(input_ids=case.tokens).last_hidden_state, plain)


def test_unknown_logits_are_refused(case_of: Any) -> None:
    class Sharper(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    case = case_of()
    with pytest.raises(BadInput, match="Sharper computes its logits"):
        Decoder(Sharper(case.model.config).eval(), case.layout.blocks)


def test_blocks_that_share_a_state_are_refused(case_of: Any) -> None:
    """A model whose last block reads what the first one computed cannot be restarted."""
    case = case_of()
    first, last = case.decoder.blocks[0], case.decoder.blocks[-1]
    memory: list[torch.Tensor] = []

    def write(module: nn.Module, args: Any, output: Any) -> None:
        memory[:] = [output]

    def read(module: nn.Module, args: Any, output: Any) -> Any:
        return output + memory[0]

    first.register_forward_hook(write)
    last.register_forward_hook(read)
    with pytest.raises(BadInput, match="more than one hidden state"):
        Decoder(case.model, case.layout.blocks)


def test_blocks_that_miss_a_cache_are_refused(case_of: Any) -> None:
    """Skipped blocks leave no keys and values behind for those that borrow them."""
    case = case_of()
    memory: dict[str, torch.Tensor] = {}
    first = case.decoder.blocks[0]
    first.self_attn.register_forward_hook(lambda _, args, output: memory.update(seen=output[0]))

    def borrow(module: nn.Module, args: Any, output: Any) -> Any:
        return output + memory.pop("seen")

    case.decoder.blocks[-1].register_forward_hook(borrow)
    with pytest.raises(BadInput, match="cannot be run one by one"):
        Decoder(case.model, case.layout.blocks)
