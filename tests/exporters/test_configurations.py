"""Targets that take a configuration alone: what it says, what is lost, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from bitsearch.errors import BadInput, BitsearchError, UsageError
from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.policy import load_policy

Make = Callable[[Mapping[str, str]], Path]
CONFIGURATIONS = ("modelopt", "bitsandbytes", "hqq", "vllm-kv", "transformers-kv")


def export(policy: Path, target: str, out: Path, *allowed: str) -> dict[str, Any]:
    return export_policy(policy, target, out, allowed=allowed, force=True)


@pytest.mark.parametrize("target", CONFIGURATIONS)
def test_no_weights_are_written_for_them(make_policy: Make, tmp_path: Path, target: str) -> None:
    path = make_policy({"0.mlp.down_proj": "nf4-g64"})
    with pytest.raises(BitsearchError):
        export(path, target, tmp_path / "out")  # one of three formats, and no word of the cache
    path = with_cache(path, {"0": ("bf16", "bf16")})
    if target.endswith("-kv"):
        with pytest.raises(UsageError, match="takes a configuration and no weights"):
            export_policy(path, target, tmp_path / "out", model="tiny", force=True)


def test_modelopt_names_every_quantizer_and_every_layer(make_policy: Make, tmp_path: Path) -> None:
    formats = {
        **{f"0.self_attn.{m}_proj": "nvfp4" for m in "qkv"},
        "0.mlp.down_proj": "int8-row-sym",
        "1.mlp.down_proj": "int4-g128-sym",
        "2.mlp.down_proj": "mxfp8",
    }
    path = make_policy(formats)
    with pytest.raises(UsageError, match=r"layers\.2\.mlp\.down_proj.*MXFP8 \(ACT_QUANTIZED\)"):
        export(path, "modelopt", tmp_path / "out")
    told = export(path, "modelopt", tmp_path / "out", "ACT_QUANTIZED")
    assert [loss["module"] for loss in told["losses"]] == ["model.layers.2.mlp.down_proj.weight"]
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quantized_layers"]["model.layers.1.mlp.down_proj"] == {
        "quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False,
        "pre_quant_scale": True,
    }  # fmt: skip
    linear = {n.removesuffix(".weight") for n in load_policy(path).modules if "embed" not in n}
    assert said["quantized_layers"].keys() | set(said["exclude_modules"]) == linear
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    entries = recipe["quantize"]["quant_cfg"]
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    named = [entry["quantizer_name"] for entry in entries[1:]]
    assert sorted(n for n in named if n.endswith(".weight_quantizer")) == sorted(
        f"model.layers.{name}.weight_quantizer" for name in formats
    )
    assert [n for n in named if n.endswith("input_quantizer")] == [
        "model.layers.2.mlp.down_proj.input_quantizer"
    ]


def test_modelopt_reads_what_modelopt_writes(tmp_path: Path) -> None:
    """An export of its own, FP8 in all but some layers, with what a policy cannot hold."""
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {
            "quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "model.layers.0*"]}})
    )  # fmt: skip
    told = import_policy(tmp_path, "modelopt", "tiny", tmp_path / "policy.json", force=False)
    modules = load_policy(tmp_path / "policy.json").modules
    assert {m.format for n, m in modules.items() if ".0." in n or "embed" in n} == {"bf16"}
    assert {m.format for n, m in modules.items() if ".1." in n} == {"fp8"}
    assert told["notes"] == [
        "one scale for a whole tensor, and activations in FP8", "the KV cache in FP8"
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["nf4-g64", "fp4-g64", "int8-row-sym"])
def test_bitsandbytes_skips_exactly_what_stays(
    make_policy: Make, tmp_path: Path, format: str
) -> None:
    """transformers' own matching: `layers.1` must not skip a layer 10."""
    kept = {"1.mlp.down_proj", "3.self_attn.q_proj"}
    modules = [f"{b}.{m}" for b in range(6) for m in ("mlp.down_proj", "self_attn.q_proj")]
    path = make_policy({name: format for name in modules if name not in kept})
    with pytest.raises(UsageError, match="accept with --allow-loss"):
        export(path, "bitsandbytes", tmp_path / "out")
    export(path, "bitsandbytes", tmp_path / "out", "ACT_QUANTIZED", "SCALE_FORMAT_CHANGED")
    config = json.loads((tmp_path / "out" / "quantization_config.json").read_text())
    parsed = BitsAndBytesConfig(**{k: v for k, v in config.items() if k != "quant_method"})
    assert parsed.load_in_8bit == (format == "int8-row-sym")
    policy = load_policy(path)
    for tensor in policy.modules:
        name = tensor.removesuffix(".weight")
        if "embed" not in name:
            converted = should_convert_module(name, parsed.llm_int8_skip_modules)
            assert converted == (policy.modules[tensor].format == format), name
    assert not should_convert_module("lm_head", parsed.llm_int8_skip_modules)
    import_policy(tmp_path / "out", "bitsandbytes", "tiny", tmp_path / "again.json", force=False)
    assert load_policy(tmp_path / "again.json").modules == policy.modules


def test_bitsandbytes_has_one_format(make_policy: Make, tmp_path: Path) -> None:
    path = make_policy({"0.mlp.down_proj": "nf4-g64", "1.mlp.down_proj": "fp4-g64"})
    with pytest.raises(BadInput, match=r"in one format, not 2.*0\.mlp\.down_proj\.weight is nf4"):
        export(path, "bitsandbytes", tmp_path / "out")


def test_hqq_has_one_format_for_each_type_of_layer(make_policy: Make, tmp_path: Path) -> None:
    uniform = {f"{block}.mlp.down_proj": "int4-g64-fz" for block in range(6)}
    path = make_policy(uniform | {f"{b}.self_attn.o_proj": "int8-g32-fz" for b in range(6)})
    assert export(path, "hqq", tmp_path / "out")["losses"] == []
    config = json.loads((tmp_path / "out" / "hqq_config.json").read_text())
    assert {kind: said["weight_quant_params"]["nbits"] for kind, said in config.items()} == {
        "mlp.down_proj": 4, "self_attn.o_proj": 8
    }  # fmt: skip
    path = make_policy(uniform | {"2.mlp.down_proj": "int3-g64-fz"})
    with pytest.raises(UsageError, match=re.escape("layers.2.mlp.down_proj.weight: int3-g64-fz")):
        export(path, "hqq", tmp_path / "out")
    path = make_policy({"2.mlp.down_proj": "int3-g64"})
    with pytest.raises(BadInput, match="nothing is quantized"):
        # one block alone: all blocks take the largest format, which is 16 bits
        export(path, "hqq", tmp_path / "out", "LAYER_COLLAPSED", "SCALE_FORMAT_CHANGED")


def with_cache(path: Path, layers: dict[str, tuple[str, str]]) -> Path:
    """The policy with formats of K and V by layer."""
    content = json.loads(path.read_text())
    content["kv_cache"] = {layer: {"k": k, "v": v} for layer, (k, v) in layers.items()}
    path.write_text(json.dumps(content))
    return path


def test_caches_of_vllm_have_one_dtype_and_a_skip_list(make_policy: Make, tmp_path: Path) -> None:
    path = make_policy({})
    with pytest.raises(BadInput, match="says nothing of the KV cache"):
        export(path, "vllm-kv", tmp_path / "out")
    path = with_cache(path, {"0": ("bf16", "bf16"), "1": ("fp8", "fp8"), "2": ("fp8", "fp8")})
    assert export(path, "vllm-kv", tmp_path / "out")["losses"] == []
    assert json.loads((tmp_path / "out" / "kv_cache.json").read_text()) == {
        "kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"],
    }  # fmt: skip
    path = with_cache(path, {"0": ("int8-row-sym", "int4-row-sym"), "1": ("int4-row-sym",) * 2})
    told = export(path, "vllm-kv", tmp_path / "out", "KV_KV_MERGED", "KV_LAYER_COLLAPSED")
    assert [(loss["code"], loss["module"], loss["to"]) for loss in told["losses"]] == [
        ("KV_KV_MERGED", "layer 0", "int8-row-sym"),
        ("KV_LAYER_COLLAPSED", "layer 1", "int8-row-sym"),
    ]
    path = with_cache(path, {"0": ("int3-g64", "int3-g64")})
    with pytest.raises(BadInput, match="layer 0 has int3-g64 in its cache, vllm-kv has not"):
        export(path, "vllm-kv", tmp_path / "out")


def test_caches_of_transformers_differ_by_layer(make_policy: Make, tmp_path: Path) -> None:
    path = with_cache(
        make_policy({}),
        {"0": ("int8-g64", "int8-g64"), "10": ("bf16", "bf16"), "2": ("int4-g32", "int4-g32")},
    )
    assert export(path, "transformers-kv", tmp_path / "out")["losses"] == []
    layers = json.loads((tmp_path / "out" / "kv_cache.json").read_text())["layers"]
    assert [layer and (layer["nbits"], layer["q_group_size"]) for layer in layers] == [
        (8, 64), (4, 32), None
    ]  # fmt: skip
