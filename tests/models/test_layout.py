"""Layouts: complete, without weights, and of matrices that really multiply activations."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from bitsearch.errors import BadInput
from bitsearch.models import find_layout, find_units, skeleton
from bitsearch.units import ModelLayout, Unit

Make = Callable[..., Any]


def layout_of(config: PreTrainedConfig, *, fuse: bool = True) -> ModelLayout:
    return find_layout(skeleton(config), reference="random", fuse=fuse)


def unit(layout: ModelLayout, name: str) -> Unit:
    return next(unit for unit in layout.units if unit.name == name)


@pytest.mark.parametrize("fuse", [True, False])
def test_skeleton_and_real_model_have_the_same_layout(
    config: PreTrainedConfig, instantiate: Make, fuse: bool
) -> None:
    real = find_layout(instantiate(config), reference="random", fuse=fuse)
    assert layout_of(config, fuse=fuse) == real


@pytest.mark.parametrize("fuse", [True, False])
def test_units_and_kept_parameters_are_a_partition(
    config: PreTrainedConfig, instantiate: Make, fuse: bool
) -> None:
    model = instantiate(config)
    layout = find_layout(model, reference="random", fuse=fuse)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = [matrix for unit in layout.units for matrix in unit.matrices]
    found = Counter({matrix.name: matrix.parameters for matrix in matrices})
    found.update(layout.kept)
    assert found == sizes
    assert len(matrices) + len(layout.kept) == len(sizes)
    assert layout.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len({unit.name for unit in layout.units}) == len(layout.units)


def test_every_linear_weight_of_a_block_is_a_matrix_or_excluded(
    config: PreTrainedConfig, instantiate: Make
) -> None:
    model = instantiate(config)
    layout = find_layout(model, reference="random")
    matrices = {matrix.name for unit in layout.units for matrix in unit.matrices}
    for block in layout.blocks:
        for name, module in model.get_submodule(block).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                path = f"{block}.{name}"
                assert (f"{path}.weight" in matrices) != (path in layout.excluded), path


def test_every_linear_matrix_sees_activations_of_its_width(
    config: PreTrainedConfig, instantiate: Make
) -> None:
    model = instantiate(config)
    seen: dict[str, tuple[int, int]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = (output.shape[-1], inputs[0].shape[-1])

        return hook

    linear = [
        matrix
        for unit in find_layout(model, reference="random").units
        if unit.kind in ("linear", "fused", "head")
        for matrix in unit.matrices
    ]
    for matrix in linear:
        model.get_submodule(matrix.module).register_forward_hook(watch(matrix.module))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    assert seen == {matrix.module: (matrix.out_features, matrix.in_features) for matrix in linear}


def test_packed_experts_reduce_over_the_right_axis(
    family: str, config: PreTrainedConfig, instantiate: Make
) -> None:
    layout = find_layout(instantiate(config), reference="random")
    experts = [unit for unit in layout.units if unit.kind == "experts"]
    if not hasattr(config, "num_experts_per_tok"):
        assert not experts
        return
    assert experts
    for gate_up, down in zip(experts[::2], experts[1::2], strict=True):
        first, second = gate_up.matrices[0], down.matrices[0]
        assert (first.role, second.role) == ("experts.gate_up", "experts.down")
        assert first.in_features == second.out_features == config.hidden_size
        assert first.out_features == 2 * second.in_features
        assert first.count == second.count > 1
        assert first.transposed == second.transposed == (family in ("gpt_oss", "llama4_text"))


def test_llama_units_in_forward_order(configured: Make) -> None:
    layout = layout_of(configured("llama", num_hidden_layers=1, tie_word_embeddings=False))
    assert [(unit.name, unit.kind, unit.block) for unit in layout.units] == [
        ("model.embed_tokens", "embedding", None),
        ("model.layers.0.self_attn.qkv_proj", "fused", 0),
        ("model.layers.0.self_attn.o_proj", "linear", 0),
        ("model.layers.0.mlp.gate_up_proj", "fused", 0),
        ("model.layers.0.mlp.down_proj", "linear", 0),
        ("lm_head", "head", None),
    ]
    roles = " ".join(matrix.role for unit in layout.units for matrix in unit.matrices)
    assert roles == "embedding attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down head"
    assert layout.blocks == ("model.layers.0",)
    assert layout.architecture == "LlamaForCausalLM"
    assert layout.model_type == "llama"


def test_fused_members_stand_in_the_order_of_concatenation(configured: Make) -> None:
    # OPT defines k, v and q in this order; engines concatenate q, k and v.
    fused = unit(layout_of(configured("opt")), "model.decoder.layers.1.self_attn.qkv_proj")
    assert [matrix.role for matrix in fused.matrices] == ["attn.q", "attn.k", "attn.v"]
    assert fused.block == 1


def test_unfused_units_have_one_matrix_each(config: PreTrainedConfig) -> None:
    layout = layout_of(config, fuse=False)
    assert all(len(unit.matrices) == 1 for unit in layout.units)
    assert all(unit.kind != "fused" for unit in layout.units)


def test_blocks_follow_the_embedding_and_precede_the_head(config: PreTrainedConfig) -> None:
    layout = layout_of(config)
    blocks = [unit.block for unit in layout.units]
    assert blocks[0] is None
    inner = [block for block in blocks if block is not None]
    assert inner == sorted(inner)
    assert set(inner) == set(range(len(layout.blocks)))
    assert blocks[1 : 1 + len(inner)] == inner


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embedding_and_head_are_one_unit(family: str, configured: Make, tied: bool) -> None:
    layout = layout_of(configured(family, tie_word_embeddings=tied))
    embedding, last = layout.units[0], layout.units[-1]
    names = (embedding.matrices[0].name, "lm_head.weight")
    assert layout.tied == ((names,) if tied else ())
    assert (last.kind == "head") is not tied
    assert embedding.kind == "embedding"
    assert embedding.matrices[0].name.endswith(("embed_tokens.weight", "wte.weight"))


def test_conv1d_is_transposed(configured: Make) -> None:
    layout = layout_of(configured("gpt2"))
    matrix = unit(layout, "transformer.h.0.mlp.c_fc").matrices[0]
    assert (matrix.out_features, matrix.in_features, matrix.transposed) == (40, 32, True)
    assert [unit.matrices[0].role for unit in layout.units[1:5]] == [
        "attn.qkv",
        "attn.o",
        "mlp.fc1",
        "mlp.fc2",
    ]


@pytest.mark.parametrize(
    ("family", "excluded"),
    [
        ("llama", {}),
        ("gpt2", {"transformer.wpe": "not the token embedding"}),
        (
            "opt",
            {
                "model.decoder.embed_positions": "not the token embedding",
                "model.decoder.project_in": "outside the decoder blocks",
                "model.decoder.project_out": "outside the decoder blocks",
            },
        ),
        ("mixtral", {f"model.layers.{block}.mlp.gate": "router" for block in range(2)}),
        ("gpt_oss", {f"model.layers.{block}.mlp.router": "router" for block in range(2)}),
        ("deepseek_v3", {"model.layers.1.mlp.gate": "router"}),
        (
            "qwen2_moe",
            {
                f"model.layers.{block}.mlp.{gate}": "router"
                for block in range(2)
                for gate in ("gate", "shared_expert_gate")
            },
        ),
    ],
    indirect=["family"],
)
def test_excluded_modules_come_with_the_reason(
    config: PreTrainedConfig, excluded: dict[str, str]
) -> None:
    layout = layout_of(config)
    assert layout.excluded == excluded
    for module in excluded:
        assert any(name.startswith(f"{module}.") for name in layout.kept)


def test_latent_attention_fuses_its_down_projections(configured: Make) -> None:
    fused = unit(layout_of(configured("deepseek_v3")), "model.layers.0.self_attn.fused_qkv_a_proj")
    assert [matrix.module.rpartition(".")[2] for matrix in fused.matrices] == [
        "q_a_proj",
        "kv_a_proj_with_mqa",
    ]


def test_text_decoder_of_a_multimodal_model_is_found(configured: Make) -> None:
    text = configured("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = skeleton(config)
    layout = find_layout(model, reference="random")
    assert layout.blocks == tuple(f"model.language_model.layers.{block}" for block in range(2))
    assert layout.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert any("vision_tower" in module for module in layout.excluded)
    assert not any("vision_tower" in unit.name for unit in layout.units)


def test_planning_a_huge_model_allocates_nothing() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    model = skeleton(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    layout = find_layout(model, reference="random")
    assert layout.parameters == 70_553_706_496
    assert len(find_units(model, fuse=False)) == 2 + 80 * 7


@pytest.mark.parametrize(
    ("family", "message"),
    [("t5", "has an encoder"), ("vit", "no causal language model")],
)
def test_other_kinds_of_models_are_refused(family: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        skeleton(AutoConfig.for_model(family))


def test_invalid_configuration_is_refused(configured: Make) -> None:
    with pytest.raises(BadInput, match="configuration is not valid"):
        skeleton(configured("llama", hidden_act="no such function"))


def test_missing_block_list_names_the_module() -> None:
    config = AutoConfig.for_model("longcat_flash", num_layers=1, vocab_size=96, n_routed_experts=2)
    with pytest.raises(BadInput, match=r"'model' .*holds no list of \d+ decoder blocks"):
        find_layout(skeleton(config), reference="random")


def test_unknown_arrangement_of_experts_names_the_module() -> None:
    config = AutoConfig.for_model("jetmoe", hidden_size=32, num_hidden_layers=1, vocab_size=96)
    with pytest.raises(BadInput, match=r"'model\.layers\.0\..*unknown arrangement"):
        find_layout(skeleton(config), reference="random")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import bitsearch.models, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
