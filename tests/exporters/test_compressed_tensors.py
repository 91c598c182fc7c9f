"""compressed-tensors' own code resolves and unpacks what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file

from bitsearch.errors import BitsearchError
from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.formats import parse_format
from bitsearch.models.layout import skeleton
from bitsearch.models.load import load_model, open_layout
from bitsearch.policy import load_policy
from bitsearch.score import candidate_weights

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


def export(policy: Path, out: Path, model: str | None = None, *allowed: str) -> dict[str, Any]:
    return export_policy(
        policy, "compressed-tensors", out, model=model, allowed=allowed, statistics=None,
        device="cpu", force=False, progress=lambda *_: None,
    )  # fmt: skip


def test_its_own_code_resolves_every_module_as_the_policy_says(
    make_policy: Make, tmp_path: Path
) -> None:
    path = make_policy(MIXED)
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
        assert (got.num_bits, got.symmetric) == (asked.bits, asked.symmetric), name
        assert got.group_size == asked.group_size, name
        assert got.strategy == ("group" if asked.group_size else "channel"), name


def test_its_own_code_unpacks_exactly_the_measured_weights(
    make_policy: Make, tmp_path: Path
) -> None:
    path = make_policy(MIXED)
    told = export(path, tmp_path / "out", "tiny")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert told["predicted_bytes"] == told["tensor_bytes"]
    assert told["tensor_bytes"] == sum(tensor.nbytes for tensor in stored.values())

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    resolved = skeleton(open_layout("tiny")[1])
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    apply_quantization_config(resolved, parsed)
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    policy = load_policy(path)
    weights = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
    for unit in loaded.layout.units:
        for matrix in unit.matrices:
            expected = weights.candidate(matrix, policy.format_of(matrix.name))
            if policy.format_of(matrix.name).exact:
                assert torch.equal(stored[matrix.name].float(), expected)
                continue
            inside = {
                key.rpartition(".")[2]: tensor.float() if key.endswith("scale") else tensor
                for key, tensor in stored.items()
                if key.startswith(f"{matrix.module}.")
            }
            scheme = resolved.get_submodule(matrix.module).quantization_scheme
            found = PackedQuantizationCompressor.decompress(inside, scheme)
            assert torch.equal(found["weight"], expected), matrix.name


def test_an_export_is_imported_as_it_was(make_policy: Make, tmp_path: Path) -> None:
    path, again = make_policy(MIXED), tmp_path / "again.json"
    told = export(path, tmp_path / "out")
    assert told["losses"] == [] and told["tensor_bytes"] is None
    for source in (tmp_path / "out" / "quantization_config.json", tmp_path / "out"):
        import_policy(source, "compressed-tensors", "tiny", again, force=True)
        assert load_policy(again).modules == load_policy(path).modules


@pytest.mark.parametrize(
    ("formats", "message", "code"),
    [
        ({"model.embed_tokens": "int4-g32"}, "model.embed_tokens.weight: int4-g32 becomes bf16",
         "EMBED_DROPPED"),
        ({"0.mlp.down_proj": "int4-g96"}, "int4-g96 becomes int4-g64", "GROUP_COERCED"),
        ({"0.mlp.down_proj": "nf4-g64"}, "model.layers.0.mlp.down_proj is nf4-g64", None),
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
