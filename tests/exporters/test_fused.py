"""What engines make one matrix of (q/k/v, gate/up): one format, under every name it is asked by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from transformers import AutoConfig

from bitsearch.exporters import load_exporter
from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.layout import find_layout, skeleton
from bitsearch.policy import Policy, load_policy

Make = Callable[[Mapping[str, str]], Path]
PREFIX = "model.layers.0.self_attn."
WIDE = {"modelopt": "int8-row-sym", "llama.cpp": "gguf-q8_0"}
NARROW = {"llama.cpp": "gguf-q4_0"}


def mixed(make_policy: Make, target: str) -> Path:
    """k is wider than q and v."""
    wide, narrow = WIDE.get(target, "int8-g64-sym"), NARROW.get(target, "int4-g64-sym")
    return make_policy({f"{PREFIX}{m}_proj": wide if m == "k" else narrow for m in "qkv"})


@pytest.mark.parametrize(
    "target", ["compressed-tensors", "gptqmodel", "autoround", "torchao", "modelopt"]
)
def test_members_take_the_widest_format_and_it_is_told(make_policy: Make, target: str) -> None:
    policy = load_policy(mixed(make_policy, target))
    translation = load_exporter(target).translate(policy)
    members = [f"{PREFIX}{m}_proj.weight" for m in "qkv"]
    assert {translation.formats[m].name for m in members} == {WIDE.get(target, "int8-g64-sym")}
    told = {(loss.code, loss.module) for loss in translation.losses}
    assert told == {("FUSED_HARMONISED", members[0]), ("FUSED_HARMONISED", members[2])}


@pytest.mark.parametrize("target", ["llama.cpp", "mlx", "onnxruntime"])
def test_where_nothing_is_fused_they_keep_their_own(make_policy: Make, target: str) -> None:
    policy = load_policy(mixed(make_policy, target))
    translation = load_exporter(target).translate(policy)
    assert translation.losses == ()
    assert len({translation.formats[f"{PREFIX}{m}_proj.weight"] for m in "qk"}) == 2


def test_torchao_names_what_vllm_looks_for(make_policy: Make, tmp_path: Path) -> None:
    """vLLM asks for fused names alone, transformers for members."""
    parts = {f"0.self_attn.{m}_proj": "int4-g64-sym" for m in "qkv"}
    parts |= {f"0.mlp.{m}_proj": "int8-g64-sym" for m in ("gate", "up")}
    export_policy(make_policy(parts), "torchao", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quantization_config.json").read_text())
    table = config["quant_type"]["default"]["_data"]["fqn_to_config"]
    names = {name.removeprefix("model.layers.") for name in table}
    assert names == {*parts, "0.self_attn.qkv_proj", "0.mlp.gate_up_proj"}
    assert table["model.layers.0.self_attn.qkv_proj"] == table[f"{PREFIX}q_proj"]


def test_compressed_tensors_names_every_linear_layer(make_policy: Make, tmp_path: Path) -> None:
    """SGLang refuses a checkpoint with one that is neither a target nor ignored."""
    path = make_policy({"0.mlp.down_proj": "int4-g64-sym", "1.mlp.down_proj": "fp8"})
    export_policy(path, "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quantization_config.json").read_text())
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    linear = {n.removesuffix(".weight") for n in load_policy(path).modules if "embed" not in n}
    assert sorted([*targets, *config["ignore"]]) == sorted(linear | {"lm_head"})  # it is tied


@pytest.mark.parametrize(
    "target", ["compressed-tensors", "gptqmodel", "autoround", "torchao", "modelopt"]
)
def test_stacked_experts_stay_as_they_are(policy_for: Callable[..., Policy], target: str) -> None:
    """They are one tensor here, and one a matrix in the files of these targets."""
    config = AutoConfig.for_model("qwen3_moe", hidden_size=128, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        vocab_size=64, num_experts=4, moe_intermediate_size=64)  # fmt: skip
    layout = find_layout(skeleton(config), reference="experts")
    stack = next(m.name for unit in layout.units for m in unit.matrices if m.count > 1)
    translation = load_exporter(target).translate(policy_for(layout, {}, {stack: "int4-g64-sym"}))
    assert translation.formats[stack].exact
    assert [(loss.code, loss.module) for loss in translation.losses] == [("WIDTH_PROMOTED", stack)]
