"""Layouts without a model, and a tokenizer without a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitsearch.formats import parse_formats
from bitsearch.space import Space, make_space
from bitsearch.units import Matrix, ModelLayout, Unit

# Machines differ in speed; what counts is the answer.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

VOCABULARY = 200


def make_layout(blocks: int = 2, width: int = 48, *, tied: bool = True) -> ModelLayout:
    """A decoder whose sizes divide by no group size, with a unit of every kind."""
    units = [
        Unit("embed", "embedding", (Matrix("embed.weight", VOCABULARY, width, role="embedding"),))
    ]
    for index in range(blocks):
        at = f"blocks.{index}"
        qkv = tuple(
            Matrix(f"{at}.{name}.weight", rows, width, role=f"attn.{name}")
            for name, rows in (("q", width), ("k", 20), ("v", 20))
        )
        units += [
            Unit(f"{at}.qkv", "fused", qkv, index),
            Unit(f"{at}.o", "linear", (Matrix(f"{at}.o.weight", width, width),), index),
            Unit(
                f"{at}.experts",
                "experts",
                (
                    Matrix(f"{at}.experts.up", 30, width, count=3, role="experts.up"),
                    Matrix(f"{at}.experts.down", width, 30, count=3, role="experts.down"),
                ),
                index,
            ),
        ]
    tie: tuple[tuple[str, ...], ...] = (("embed.weight", "head.weight"),)
    if not tied:
        units.append(Unit("head", "head", (Matrix("head.weight", VOCABULARY, width),)))
        tie = ()
    return ModelLayout(
        reference="made-up",
        revision=None,
        architecture="MadeUpForCausalLM",
        model_type="made_up",
        dtype="bfloat16",
        units=tuple(units),
        blocks=tuple(f"blocks.{index}" for index in range(blocks)),
        kept={"norm.weight": width, "router.weight": 3 * width},
        tied=tie,
    )


@pytest.fixture
def layout() -> ModelLayout:
    """A made-up decoder of two blocks."""
    return make_layout()


@pytest.fixture
def layouts() -> Callable[..., ModelLayout]:
    """`make_layout`."""
    return make_layout


@pytest.fixture
def space(layout: ModelLayout) -> Space:
    """Five candidates everywhere."""
    return make_space(layout, parse_formats("int{2,3,4,8}-g32,bf16"))


@pytest.fixture
def tokenizer_of() -> Callable[..., Any]:
    """Makes a tokenizer of the words w0, w1, …, with or without a leading token."""

    def make(words: int = VOCABULARY, *, leading: bool = False) -> PreTrainedTokenizerFast:
        vocabulary = {"<s>": 0, "<unk>": 1} | {f"w{n}": n for n in range(2, words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if leading:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")

    return make
