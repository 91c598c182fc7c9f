"""GPTQ checkpoints: codes as the layout defines them, and rules that engines match."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.formats import Format
from bitsearch.models.layout import FUSED_SETS
from bitsearch.models.load import load_model, open_layout
from bitsearch.policy import Policy, load_policy
from bitsearch.score import candidate_weights

Make = Callable[[Mapping[str, str]], Path]
SYMMETRIC = {
    **{f"0.self_attn.{m}_proj": "int4-g32-sym" for m in "qkv"},
    **{f"1.self_attn.{m}_proj": "int8-row-sym" for m in "qkv"},
    **{f"2.mlp.{m}_proj": "int4-g64-sym" for m in ("gate", "up")},
    **{f"3.mlp.{m}_proj": "int2-g128-sym" for m in ("gate", "up")},
    "0.mlp.down_proj": "int3-g32-sym",
    "1.mlp.down_proj": "int4-g64-sym",
}
ASYMMETRIC = SYMMETRIC | {"5.self_attn.o_proj": "int4-g32", "4.mlp.down_proj": "int3-row"}


def export(policy: Path, target: str, out: Path, model: str | None = None) -> dict[str, Any]:
    return export_policy(policy, target, out, model=model)


def unpacked(words: torch.Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Codes along the first axis, from the definition: bit b of a column is bit b of word b/32."""
    columns = words.numpy().astype(np.uint32)
    bit = (columns[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    stream = bit.reshape(-1, bits, columns.shape[1])
    weights = (1 << np.arange(bits)).reshape(1, -1, 1)
    found: np.ndarray[Any, Any] = (stream * weights).sum(axis=1)
    return found


@pytest.mark.parametrize("target", ["gptqmodel", "autoround"])
@pytest.mark.parametrize("formats", [SYMMETRIC, ASYMMETRIC], ids=["sym", "asym"])
def test_checkpoints_decode_to_exactly_the_measured_weights(
    make_policy: Make, tmp_path: Path, target: str, formats: dict[str, str]
) -> None:
    path = make_policy(formats)
    told = export(path, target, tmp_path / "out", "tiny")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert told["predicted_bytes"] == told["tensor_bytes"]
    assert told["tensor_bytes"] == sum(tensor.nbytes for tensor in stored.values())

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if target == "gptqmodel":
        first = config["checkpoint_format"] == "gptq"
    else:
        first = config["packing_format"] == "auto_round:auto_gptq"
    assert first == (formats is SYMMETRIC)
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    policy = load_policy(path)
    weights = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
    for unit in loaded.layout.units:
        for matrix in unit.matrices:
            format = policy.format_of(matrix.name)
            expected = weights.candidate(matrix, format)
            if format.exact:
                assert torch.equal(stored[matrix.name].float(), expected)
                continue
            at = matrix.module
            group = np.arange(matrix.in_features) // (format.group_size or matrix.in_features)
            if target == "gptqmodel":
                assert stored[f"{at}.g_idx"].tolist() == group.tolist()
            codes = unpacked(stored[f"{at}.qweight"], format.bits)
            zeros = unpacked(stored[f"{at}.qzeros"].T.contiguous(), format.bits).T
            scales = stored[f"{at}.scales"].float().numpy()
            zeros = (zeros + first) % 2**format.bits if first else zeros
            values = scales[group] * (codes.astype(np.int64) - zeros.astype(np.int64)[group])
            assert np.array_equal(values.T, expected.numpy()), matrix.name


def dynamic_override(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """How vLLM and SGLang look a module up: the first rule that matches from the start."""
    for text, override in config["dynamic"].items():
        if text.startswith("-:"):
            if re.match(text.removeprefix("-:"), name):
                return None
        elif re.match(text.removeprefix("+:"), name):
            return {**config, **override}
    return config


def members(name: str) -> list[str]:
    """What an engine loads into a fused module."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for fused, parts in FUSED_SETS if fused == leaf for part in parts]


def asked(policy: Policy, name: str) -> Format:
    return policy.format_of(f"{name}.weight")


def test_rules_are_found_by_the_fused_name_and_by_its_members(
    make_policy: Make, tmp_path: Path
) -> None:
    path = make_policy(SYMMETRIC)
    export(path, "gptqmodel", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    policy = load_policy(path)
    names = [name.removesuffix(".weight") for name in policy.modules if "layers" in name]
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    names += [f"{p}.qkv_proj" for p in parents if p.endswith("self_attn")]
    names += [f"{p}.gate_up_proj" for p in parents if p.endswith("mlp")]
    for name in names:
        parts = [part for part in members(name) if f"{part}.weight" in policy.modules]
        expected = asked(policy, parts[0] if parts else name)
        found = dynamic_override(config, name)
        if expected.exact:
            assert found is None, name
            continue
        assert found is not None, name
        assert (found["bits"], found["group_size"], found["sym"]) == (
            expected.bits, expected.group_size or -1, expected.symmetric
        ), name  # fmt: skip
    # anchored at both ends: one rule is never found in another module's name
    rules = [text[2:] for text in config["dynamic"]]
    for rule in rules:
        assert sum(bool(re.match(rule, f"{name}")) for name in names) == 1
        assert not any(re.match(rule, f"{name}.inner") for name in names)
        assert not any(re.match(rule, name.replace(".", "_")) for name in names)


def test_every_entry_of_autoround_says_its_bits(make_policy: Make, tmp_path: Path) -> None:
    """vLLM takes an entry without them for an unquantized module."""
    path = make_policy(SYMMETRIC)
    export(path, "autoround", tmp_path / "out", "tiny")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    policy = load_policy(path)
    linear = {name.removesuffix(".weight") for name in policy.modules if "embed" not in name}
    assert config["extra_config"].keys() == linear
    for name, entry in config["extra_config"].items():
        format = asked(policy, name)
        assert entry["bits"] == format.bits
        assert format.exact or entry["group_size"] == (format.group_size or -1)


def test_a_skip_beats_every_override_wherever_it_stands(make_policy: Make, tmp_path: Path) -> None:
    """As GPTQModel reads it: a rule after a skip of the whole block does not count."""
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True,
        "dynamic": {
            r"+:model\.layers\.3\.mlp\.down_proj": {"bits": 8},
            r"model\.layers\.2\..*": {"group_size": 32},
            r"-:model\.layers\.3\..*": {},
        },
    }  # fmt: skip
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    out = tmp_path / "policy.json"
    import_policy(tmp_path, "gptqmodel", "tiny", out, force=False)
    modules = load_policy(out).modules
    assert modules["model.layers.3.mlp.down_proj.weight"].format == "bf16"
    assert modules["model.layers.2.mlp.down_proj.weight"].format == "int4-g32-sym"
    assert modules["model.layers.1.mlp.down_proj.weight"].format == "int4-g64-sym"
