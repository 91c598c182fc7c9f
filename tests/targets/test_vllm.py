"""vLLM on CPU runs what was written for it: zero points, rows, a head, and KV caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsearch.exporters import compressed_tensors
from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.builtin import builtin_folder
from bitsearch.policy import load_policy

Make = Callable[..., Path]
TEXTS = ("The history of", "In the year", "A man who")
COUNT = 16
MIXED = {
    **{f"0.self_attn.{m}_proj": "int4-g32" for m in "qkv"},
    **{f"1.self_attn.{m}_proj": "int4-g64-sym" for m in "qkv"},
    **{f"2.self_attn.{m}_proj": "int4-row" for m in "qkv"},
    **{f"0.mlp.{m}_proj": "int4-g128" for m in ("gate", "up")},
    **{f"1.mlp.{m}_proj": "int4-row-sym" for m in ("gate", "up")},
    "0.mlp.down_proj": "int4-g64",
    "1.mlp.down_proj": "int4-g32-sym",
    "3.self_attn.o_proj": "int4-g128",
}


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """The shipped model with a head of its own."""
    folder = builtin_folder("tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def continued(engine: Any, folder: Path, model: Any, **more: Any) -> tuple[float, Any]:
    """How far the engine's tokens lie below the best ones, and its tokens."""
    prompts = model.prompts(TEXTS)
    found = engine.run(
        "vllm_tokens.py", folder, "float16", json.dumps(prompts), COUNT, json.dumps(more)
    )
    return model.shortfall(prompts, found), found


def test_zero_points_rows_and_a_head(
    environment: Any, record: Any, fake: Any, make_policy: Make, untied: Path, tmp_path: Path
) -> None:
    engine = environment("vllm")
    path = make_policy(MIXED | {"lm_head": "int4-g32"}, untied)
    told = export_policy(
        path, "vllm-cpu", tmp_path / "out", model=str(untied), allowed=(), statistics=None,
        device="cpu", force=False, progress=lambda *_: None,
    )  # fmt: skip
    assert told["tensor_bytes"] == told["predicted_bytes"] and not told["losses"]
    below, _ = continued(engine, tmp_path / "out", fake(path, untied))
    record("compressed-tensors", engine.version("vllm-cpu"),
           "asymmetric, groups and rows, a quantized head: tokens in float16",
           f"at most {below:.3f} logits below the best token")  # fmt: skip
    assert below < 0.05


def test_mixed_symmetry_in_a_fused_set_is_read_wrongly_without_a_word(
    environment: Any, fake: Any, make_policy: Make, tmp_path: Path
) -> None:
    """Why the exporter gives fused sets one format: this one was written past it."""
    engine = environment("vllm")
    path = make_policy(
        {"0.self_attn.q_proj": "int4-g64-sym", "0.self_attn.k_proj": "int4-g64",
         "0.self_attn.v_proj": "int4-g64"}
    )  # fmt: skip
    with pytest.raises(Exception, match="FUSED_HARMONISED"):
        _export(path, tmp_path / "refused")
    asked = load_policy(path)
    careless = compressed_tensors.EXPORTER.translate(asked)
    as_asked = {tensor: asked.format_of(tensor) for tensor in asked.modules}
    assert careless.formats != as_asked
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bitsearch.exporters.fit._harmonise", lambda *_: iter(()))
        _export(path, tmp_path / "out")
    prompts = fake(path, "tiny").prompts(TEXTS)
    try:
        below, _ = continued(engine, tmp_path / "out", fake(path, "tiny"))
    except AssertionError as error:
        assert "Error" in str(error) and prompts  # a version that refuses to load it
        return
    assert below > 0.5


def _export(path: Path, out: Path) -> dict[str, Any]:
    return export_policy(
        path, "compressed-tensors", out, model="tiny", allowed=(), statistics=None, device="cpu",
        force=False, progress=lambda *_: None,
    )  # fmt: skip


def test_a_quantized_cache_with_layers_left_out(
    environment: Any, record: Any, fake: Any, make_policy: Make, tmp_path: Path
) -> None:
    engine = environment("vllm")
    path = make_policy({})
    content = json.loads(path.read_text())
    formats: Mapping[int, str] = {0: "bf16", 3: "bf16"}
    content["kv_cache"] = {
        str(layer): {"k": formats.get(layer, "fp8"), "v": formats.get(layer, "fp8")}
        for layer in range(6)
    }
    path.write_text(json.dumps(content))
    export_policy(
        path, "vllm-kv", tmp_path / "out", model=None, allowed=(), statistics=None, device="cpu",
        force=False, progress=lambda *_: None,
    )  # fmt: skip
    arguments = json.loads((tmp_path / "out" / "kv_cache.json").read_text())
    below, _ = continued(engine, builtin_folder("tiny"), fake(path, "tiny"), **arguments)
    record("vllm-kv", engine.version("vllm-cpu"), "an FP8 cache, two layers left out: tokens",
           f"at most {below:.3f} logits below the best token of a 16-bit cache")  # fmt: skip
    assert below < 1
