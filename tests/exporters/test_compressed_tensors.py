"""compressed-tensors' own code resolves and unpacks what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file

from bitsearch.errors import BadInput, BitsearchError
from bitsearch.exporters import compressed_tensors
from bitsearch.exporters.compressed_schemes import weight_arguments
from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.formats import parse_format
from bitsearch.models.layout import skeleton
from bitsearch.models.load import load_model, open_layout
from bitsearch.policy import load_policy
from bitsearch.quantizers.rtn import quantize
from bitsearch.score import candidate_weights
from bitsearch.units import ModelLayout

Make = Callable[[Mapping[str, str]], Path]
MIXED = {
    **{f"0.self_attn.{m}_proj": "int4-g32-sym" for m in "qkv"},
    **{f"1.self_attn.{m}_proj": "int3-g64" for m in "qkv"},
    **{f"2.mlp.{m}_proj": "int8-row-sym" for m in ("gate", "up")},
    **{f"3.mlp.{m}_proj": "int5-row" for m in ("gate", "up")},
    "0.mlp.down_proj": "int2-g128",
    "4.mlp.down_proj": "int6-g32-sym",
    "5.self_attn.o_proj": "int7-g64",
}
FLOATS = {
    **{f"0.self_attn.{m}_proj": "fp8" for m in "qkv"},
    **{f"1.self_attn.{m}_proj": "mxfp4" for m in "qkv"},
    **{f"2.mlp.{m}_proj": "mxfp8" for m in ("gate", "up")},
    "0.mlp.down_proj": "nvfp4",
    "4.mlp.down_proj": "int6-g32-sym",
    "5.self_attn.o_proj": "nvfp4",
}
LAYOUTS = {
    "fp8": "float-quantized", "mxfp8": "mxfp8-quantized", "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}  # fmt: skip
both = pytest.mark.parametrize("formats", [MIXED, FLOATS], ids=["integers", "floats"])


def export(policy: Path, out: Path, model: str | None = None, *allowed: str) -> dict[str, Any]:
    return export_policy(policy, "compressed-tensors", out, model=model, allowed=allowed)


@both
def test_its_own_code_resolves_every_module_as_the_policy_says(
    make_policy: Make, tmp_path: Path, formats: dict[str, str]
) -> None:
    path = make_policy(formats)
    export(path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quantization_config.json").read_text())
    model = skeleton(open_layout("tiny")[1])
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    policy = load_policy(path)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        scheme = getattr(module, "quantization_scheme", None)
        asked = policy.format_of(f"{name}.weight") if name != "lm_head" else parse_format("bf16")
        if asked.exact:
            assert scheme is None, name
            continue
        got = scheme.weights
        assert scheme.format == LAYOUTS.get(asked.name, "pack-quantized"), name
        assert (got.num_bits, got.symmetric) == (asked.bits, asked.symmetric), name
        assert got.group_size == asked.group_size, name
        assert got.type == ("float" if asked.name in LAYOUTS else "int"), name


def unpacked(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(tensor, weights) of every quantized module, by the library's own code."""
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    resolved = skeleton(open_layout("tiny")[1])
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    apply_quantization_config(resolved, parsed)
    for name, module in resolved.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        inside = {
            key.rpartition(".")[2]: tensor.float() if tensor.dtype == torch.float16 else tensor
            for key, tensor in stored.items()
            if key.rpartition(".")[0] == name
        }
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        yield f"{name}.weight", compressor.decompress(inside, scheme)["weight"]


@both
def test_its_own_code_unpacks_exactly_the_measured_weights(
    make_policy: Make, tmp_path: Path, formats: dict[str, str]
) -> None:
    path = make_policy(formats)
    told = export(path, tmp_path / "out", "tiny")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert told["predicted_bytes"] == told["tensor_bytes"] and told["losses"] == []
    assert told["tensor_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    policy = load_policy(path)
    weights = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
    found = dict(unpacked(tmp_path / "out"))
    for matrix in (m for unit in loaded.layout.units for m in unit.matrices):
        format = policy.format_of(matrix.name)
        expected = weights.candidate(matrix, format)
        if format.exact:
            assert torch.equal(stored[matrix.name].float(), expected)
        elif format.name == "nvfp4":
            # the library unpacks it in bfloat16, and divides where we multiply
            torch.testing.assert_close(found[matrix.name].float(), expected, rtol=2**-8, atol=0)
        else:
            assert torch.equal(found[matrix.name].float(), expected), matrix.name


def test_the_scales_of_nvfp4_are_the_measured_ones(make_policy: Make, tmp_path: Path) -> None:
    path = make_policy({"0.mlp.down_proj": "nvfp4"})
    export(path, tmp_path / "out", "tiny")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    args = QuantizationArgs.model_validate(weight_arguments(parse_format("nvfp4")))
    codes = stored[f"{name}.weight_packed"]
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    found = dequantize(
        unpack_fp4_from_uint8(codes, rows, columns, torch.float32),
        stored[f"{name}.weight_scale"].float(),
        args=args,
        global_scale=stored[f"{name}.weight_global_scale"],
    )
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    weights = candidate_weights(loaded.model, load_policy(path), path, None, cache_bytes=0)
    (matrix,) = (m for u in loaded.layout.units for m in u.matrices if m.module == name)
    expected = weights.candidate(matrix, parse_format("nvfp4"))
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)


def test_fused_nvfp4_matrices_share_the_scale_that_an_engine_takes_for_all(
    make_policy: Make, tmp_path: Path
) -> None:
    path = make_policy({f"0.self_attn.{m}_proj": "nvfp4" for m in "qkv"})
    with pytest.raises(BitsearchError, match="SCALE_SHARED"):
        export(path, tmp_path / "out", "tiny")
    told = export(path, tmp_path / "out", "tiny", "SCALE_SHARED")
    assert told["predicted_bytes"] == told["tensor_bytes"] and len(told["losses"]) == 3
    stored = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    assert len({float(stored[f"{prefix}{m}_proj.weight_global_scale"]) for m in "qkv"}) == 1
    found = dict(unpacked(tmp_path / "out"))
    original = load_model(open_layout("tiny")[2], dtype="float32").model
    whole = torch.cat([original.get_parameter(f"{prefix}{m}_proj.weight") for m in "qkv"])
    expected = quantize(whole.detach(), parse_format("nvfp4")).dequantize()
    together = torch.cat([found[f"{prefix}{m}_proj.weight"] for m in "qkv"]).float()
    torch.testing.assert_close(together, expected, rtol=2**-8, atol=0)


@both
def test_an_export_is_imported_as_it_was(
    make_policy: Make, tmp_path: Path, formats: dict[str, str]
) -> None:
    path, again = make_policy(formats), tmp_path / "again.json"
    told = export(path, tmp_path / "out")
    assert told["losses"] == [] and told["tensor_bytes"] is None
    for source in (tmp_path / "out" / "quantization_config.json", tmp_path / "out"):
        found = import_policy(source, "compressed-tensors", "tiny", again, force=True)
        assert load_policy(again).modules == load_policy(path).modules and found["notes"] == []


def test_floats_of_other_tools_are_read_as_the_nearest(layout: ModelLayout, tmp_path: Path) -> None:
    """What llm-compressor writes for its FP8 scheme; then blocks, which no format of ours is."""
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    content = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group},
               "ignore": ["lm_head"]}  # fmt: skip
    path = tmp_path / "quantization_config.json"
    path.write_text(json.dumps(content))
    reading = compressed_tensors.read(path, layout)
    assert {format.name for format in reading.formats.values()} == {"fp8"}
    assert reading.notes == ("one scale for a whole tensor", "activations are quantized")
    weights |= {"strategy": "block", "block_structure": [128, 128]}
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="no format of ours is 8-bit float by block"):
        compressed_tensors.read(path, layout)


@pytest.mark.parametrize(
    ("formats", "message", "code"),
    [
        ({"model.embed_tokens": "int4-g32"}, "model.embed_tokens.weight: int4-g32 becomes bf16",
         "EMBED_DROPPED"),
        ({"0.mlp.down_proj": "int4-g96"}, "int4-g96 becomes int4-g64", "GROUP_COERCED"),
        ({"0.mlp.down_proj": "nf4-g64"}, "model.layers.0.mlp.down_proj is nf4-g64", None),
        ({"0.mlp.down_proj": "fp8-g128"}, "integers, fp8, mxfp8, mxfp4 and nvfp4", None),
        ({f"0.self_attn.{m}_proj": "mxfp4" if m == "q" else "fp8" for m in "qkv"},
         "q_proj.weight: mxfp4 becomes fp8", "FUSED_HARMONISED"),
        # an engine that fuses them reads the codes of one with the zero points of another
        ({"0.self_attn.q_proj": "int4-g32-sym", "0.self_attn.k_proj": "int4-g32",
          "0.self_attn.v_proj": "int4-g32"},
         "q_proj.weight: int4-g32-sym becomes int4-g32", "FUSED_HARMONISED"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused_by_name(
    make_policy: Make, tmp_path: Path, formats: dict[str, str], message: str, code: str | None
) -> None:
    policy = make_policy(formats)
    with pytest.raises(BitsearchError, match=re.escape(message)):
        export(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if code is not None:
        told = export(policy, tmp_path / "out", None, code)
        assert {loss["code"] for loss in told["losses"]} == {code}
