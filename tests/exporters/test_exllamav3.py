"""ExLlamaV3's overrides: every tensor from the model of its width."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from bitsearch.errors import BitsearchError
from bitsearch.exporters import exllamav3
from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.layout import find_layout, skeleton
from bitsearch.models.load import open_layout
from bitsearch.policy import Policy

Make = Callable[[Mapping[str, str]], Path]
TINY = open_layout("tiny")[0]
LINEAR = [m.module for unit in TINY.units for m in unit.matrices if unit.kind != "embedding"]


def found_in(overrides: str, tensor: str) -> list[str]:
    """The folders that recompile would take a tensor from: keys match whole names, `*` any."""
    content = yaml.safe_load(overrides)
    folders = {source["id"]: source["model_dir"] for source in content["sources"]}
    matching = [
        folders[rule["source"]]
        for rule in content["overrides"]
        if re.fullmatch(".*".join(map(re.escape, rule["key"].split("*"))), tensor)
    ]
    return matching


def export(policy: Path, out: Path, *allowed: str) -> None:
    export_policy(policy, "exllamav3", out, allowed=allowed)


def test_every_tensor_comes_from_the_model_of_its_width(make_policy: Make, tmp_path: Path) -> None:
    formats = {
        name: f"int{2 + index % 7}-g64" if index % 3 else "nf4-g64"
        for index, name in enumerate(LINEAR)
    }
    export(make_policy(formats), tmp_path / "out", "NAME_ONLY")
    overrides = (tmp_path / "out" / "overrides.yaml").read_text()
    script = (tmp_path / "out" / "convert.sh").read_text()
    for name, format in formats.items():
        bits = re.search(r"\d", format)
        assert bits is not None
        for leaf in ("trellis", "suh", "svh"):
            assert found_in(overrides, f"{name}.{leaf}") == [f"exl3-{bits[0]}bpw"]
        assert f"-o exl3-{bits[0]}bpw -w work-{bits[0]} -b {bits[0]} -hb 6" in script
    for kept in ("model.embed_tokens.weight", "model.norm.weight",
                 "model.layers.0.input_layernorm.weight"):  # fmt: skip
        assert found_in(overrides, kept) == []


def test_a_block_is_not_taken_for_another_with_more_digits(
    policy_for: Callable[..., Policy],
) -> None:
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=64, vocab_size=64,
        num_hidden_layers=12, num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    layout = find_layout(skeleton(config), reference="made")
    linear = [m.module for unit in layout.units for m in unit.matrices if unit.kind != "embedding"]
    policy = policy_for(layout, {}, dict.fromkeys(linear, "int4-g32"))
    text = exllamav3.overrides(exllamav3.widths(policy, exllamav3.translate(policy).formats))
    assert all(len(found_in(text, f"{name}.trellis")) == 1 for name in linear)
    assert "-hb 4" in exllamav3.commands([4], 4)


def test_experts_are_named_one_by_one(policy_for: Callable[..., Policy]) -> None:
    config = AutoConfig.for_model("qwen3_moe", hidden_size=64, intermediate_size=64,
        vocab_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
        num_experts=4, moe_intermediate_size=32)  # fmt: skip
    layout = find_layout(skeleton(config), reference="made")
    matrices = [m for unit in layout.units for m in unit.matrices if unit.kind != "embedding"]
    formats = {m.name: "int4-g32" for m in matrices}
    policy = policy_for(layout, {}, formats)
    text = exllamav3.overrides(exllamav3.widths(policy, exllamav3.translate(policy).formats))
    for expert in range(4):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}.trellis"
            assert found_in(text, name) == ["exl3-4bpw"], name


@pytest.mark.parametrize(
    ("formats", "message", "allowed"),
    [
        (dict.fromkeys(LINEAR, "int4-g64"), "int4-g64 becomes EXL3 of 4 bits (NAME_ONLY)", ()),
        (dict.fromkeys(["model.embed_tokens", *LINEAR], "int8-g64"),
         "model.embed_tokens.weight: int8-g64 becomes 16 bits (EMBED_DROPPED)", ("NAME_ONLY",)),
        ({LINEAR[0]: "int4-g64"}, "model.layers.0.self_attn.qkv_proj is bf16", ("NAME_ONLY",)),
    ],
)  # fmt: skip
def test_what_it_loses_is_said(
    make_policy: Make, tmp_path: Path, formats: dict[str, str], message: str,
    allowed: tuple[str, ...],
) -> None:  # fmt: skip
    with pytest.raises(BitsearchError, match=re.escape(message)):
        export(make_policy(formats), tmp_path / "out", *allowed)
