"""Folders for MLX: the stored bits decode to what was measured; configuration and rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig

from bitsearch.errors import BadInput, BitsearchError
from bitsearch.exporters import mlx
from bitsearch.exporters.base import Checkpoint
from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.formats import parse_format
from bitsearch.formats.levels import TABLES
from bitsearch.models.load import load_model, open_layout
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.policy import Policy, load_policy, save_policy
from bitsearch.restore import candidate_weights

Make = Callable[[Mapping[str, str]], Path]
For = Callable[..., Policy]
TINY = open_layout("tiny")[0]
MODULES = [matrix.module for unit in TINY.units for matrix in unit.matrices]
AFFINE = [f"int{bits}-g{group}-fz" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
EXPRESSIBLE = [*AFFINE, "mxfp4", "mxfp8", "bf16"]
MIXED = {"model.embed_tokens": "int8-g64-fz"} | dict(
    zip(MODULES[1:], [*EXPRESSIBLE, "fp16", "int4-g64-sym", "int3-g32-sym"], strict=False)
)


def export(policy: Path, out: Path, model: str | None = None, *allowed: str) -> dict[str, Any]:
    return export_policy(policy, "mlx", out, model=model, allowed=allowed)


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, policy_for: For, hashes: dict[str, str]
) -> tuple[Path, CandidateWeights]:
    """An export of `tiny` in every format, and the weights that were measured."""
    folder = tmp_path_factory.mktemp("mlx")
    policy = policy_for(TINY, hashes, MIXED)
    (folder / "policy.json").write_text(save_policy(policy))
    source = open_layout("tiny")[2]
    loaded = load_model(source, dtype="float32")
    weights = candidate_weights(
        loaded.model, policy, folder / "policy.json", None, cache_bytes=1 << 30
    )
    checkpoint = Checkpoint(loaded, weights, source.path, "bfloat16", lambda *_: None)
    translation = mlx.translate(policy)
    assert translation.losses == ()
    stored = mlx.write(policy, translation, folder, checkpoint)
    assert stored == {"model.safetensors": translation.bytes}
    return folder, weights


def decoded(stored: Mapping[str, torch.Tensor], module: str, rule: Any) -> NDArray[np.float32]:
    """What MLX documents: codes from the low bit, then scale · code + bias, or a level."""
    words = stored[f"{module}.weight"].numpy()
    bits, group = rule["bits"], rule["group_size"]
    flat = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    planes = flat.reshape(len(words), -1, bits)
    codes = (planes * (1 << np.arange(bits))).sum(-1)
    scales = stored[f"{module}.scales"].numpy()
    if rule["mode"] == "affine":
        spread = np.repeat(scales.astype(np.float32), group, 1)
        biases = np.repeat(stored[f"{module}.biases"].numpy().astype(np.float32), group, 1)
        return (codes.astype(np.float32) * spread + biases).astype(np.float32)
    levels = np.array(TABLES[rule["mode"]].values)[codes]
    return (levels * np.repeat(2.0 ** (scales.astype(int) - 127), group, 1)).astype(np.float32)


def test_the_stored_bits_decode_to_the_measured_weights(
    exported: tuple[Path, CandidateWeights],
) -> None:
    folder, weights = exported
    policy = load_policy(folder / "policy.json")
    stored = load_file(folder / "model.safetensors")
    rules = json.loads((folder / "config.json").read_text())["quantization"]
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    for unit in loaded.layout.units:
        for matrix in unit.matrices:
            expected = weights.candidate(matrix, policy.format_of(matrix.name))
            rule = rules[matrix.module]
            if not rule:
                assert torch.equal(stored[matrix.name].float(), expected)
                continue
            found = torch.from_numpy(decoded(stored, matrix.module, rule))
            assert torch.equal(found, expected), matrix.name
    for name in loaded.layout.kept:
        parameter = loaded.model.get_parameter(name)
        torch.testing.assert_close(stored[name].float(), parameter, rtol=0, atol=2**-25)


def test_the_configuration_is_one_that_mlx_lm_reads(
    exported: tuple[Path, CandidateWeights],
) -> None:
    """It knows no rope_parameters, and takes 10,000 where rope_theta is missing."""
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["quantization"] == config["quantization_config"]
    smol = AutoConfig.for_model("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5,
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})  # fmt: skip
    found = mlx.mlx_config(smol)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"]["rope_type"] == "llama3" and "factor" in found["rope_scaling"]


def test_layers_of_gemma_as_mlx_lm_counts_them() -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=8)
    found = mlx.mlx_config(config)
    assert found["sliding_window_pattern"] == 6
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 1e4)
    config.layer_types = [*config.layer_types[:-1], "full_attention"]
    with pytest.raises(BadInput, match="no other pattern"):
        mlx.mlx_config(config)


@given(st.lists(st.sampled_from(EXPRESSIBLE), min_size=len(MODULES), max_size=len(MODULES)))
def test_an_export_is_imported_as_it_was(
    policy_for: For, hashes: dict[str, str], tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
) -> None:  # fmt: skip
    policy = policy_for(TINY, hashes, dict(zip(MODULES, names, strict=True)))
    translation = mlx.translate(policy)
    assert translation.losses == ()
    assert translation.bytes == policy.achieved.bytes
    path = tmp_path_factory.getbasetemp() / "rules.json"
    path.write_text(json.dumps(mlx.rules(policy, translation.formats)))
    found = mlx.read(path, TINY).formats
    assert {n: f.name for n, f in found.items()} == {n: m.format for n, m in policy.modules.items()}


def test_a_folder_is_imported_as_it_was_written(
    exported: tuple[Path, CandidateWeights], tmp_path: Path
) -> None:
    folder, _ = exported
    import_policy(folder, "mlx", "tiny", tmp_path / "again.json", force=False)
    again, policy = load_policy(tmp_path / "again.json"), load_policy(folder / "policy.json")
    # MLX has float zero points alone, and one name for what is not quantized
    other = {"int4-g64-sym": "int4-g64-fz", "int3-g32-sym": "int3-g32-fz", "fp16": "bf16"}
    for name, module in policy.modules.items():
        assert again.modules[name].format == other.get(module.format, module.format)


@pytest.mark.parametrize(
    ("format", "message", "codes"),
    [
        ("int4-g64", "int4-g64 becomes int4-g64-fz", {"SCALE_FORMAT_CHANGED"}),
        ("int7-g64-fz", "int7-g64-fz becomes int8-g64-fz", {"WIDTH_PROMOTED"}),
        ("int4-row-fz", "int4-row-fz becomes int4-g128-fz", {"GROUP_COERCED"}),
        ("int4-g96-sym", "int4-g96-sym becomes int4-g64-sym", {"GROUP_COERCED"}),
        ("nf4-g64", "MLX has no nf4-g64", None),
        ("nvfp4", "MLX has no nvfp4", None),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(
    make_policy: Make, tmp_path: Path, format: str, message: str, codes: set[str] | None
) -> None:
    policy = make_policy({"0.mlp.down_proj": format})
    with pytest.raises(BitsearchError, match=re.escape(message)) as caught:
        export(policy, tmp_path / "out")
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    if codes is not None:
        told = export(policy, tmp_path / "out", "tiny", *codes)
        assert {loss["code"] for loss in told["losses"]} == codes
        assert told["predicted_bytes"] == told["tensor_bytes"]
        size = (tmp_path / "out" / "model.safetensors").stat().st_size
        header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
        assert size == told["tensor_bytes"] + 8 + header


def test_a_bias_beyond_float16_is_refused(policy_for: For, hashes: dict[str, str]) -> None:
    from bitsearch.quantizers.rtn import quantize

    weight = torch.zeros(2, 64)
    weight[0, 3] = -60000.0  # 128 scales; the scale itself fits
    weight[1, 3] = 66000.0
    encoded = quantize(weight, parse_format("int8-g64-sym"))
    assert encoded.pack()["scales"].isfinite().all()
    with pytest.raises(BadInput, match="beyond float16"):
        mlx.packed("layer", encoded)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"group_size": 64, "bits": 7}, "7-bit affine in groups of 64, no format of ours"),
        ({"group_size": 16, "bits": 4}, "4-bit affine in groups of 16"),
        ({"group_size": 32, "bits": 8, "mode": "mxfp4"}, "8-bit mxfp4 in groups of 32"),
        ({}, "None-bit affine"),
    ],
)
def test_rules_of_no_format_are_told(tmp_path: Path, rules: Any, message: str) -> None:
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    with pytest.raises(BadInput, match=message):
        mlx.read(tmp_path / "rules.json", TINY)


def test_global_rules_hold_where_no_entry_is(tmp_path: Path) -> None:
    rules = {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": False,
        "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8},
        "model.layers.1.mlp.up_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization": rules}))
    reading = mlx.read(tmp_path / "config.json", TINY)
    found = {name.removesuffix(".weight"): f.name for name, f in reading.formats.items()}
    assert found["model.embed_tokens"] == "bf16"
    assert found["model.layers.0.mlp.up_proj"] == "int8-g32-fz"
    assert found["model.layers.2.mlp.up_proj"] == "int4-g64-fz"
    assert found["model.layers.1.mlp.up_proj"] == "nvfp4" and len(reading.notes) == 1
