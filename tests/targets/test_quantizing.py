"""Tools quantize the shipped model by what we wrote; what they save, we read as the policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bitsearch.exporters.checkpoints import tensor_bytes
from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.formats import parse_format
from bitsearch.models.builtin import builtin_folder
from bitsearch.models.layout import skeleton
from bitsearch.models.load import load_model, open_layout
from bitsearch.models.source import resolve
from bitsearch.models.unpacked import open_unpacked
from bitsearch.policy import Policy, load_policy
from bitsearch.quantizers.external import read_back
from bitsearch.targets.stored import STORED

Make = Callable[[Mapping[str, str]], Path]
INTEGERS = {
    **{f"0.self_attn.{m}_proj": "int4-g32-sym" for m in "qkv"},
    **{f"1.self_attn.{m}_proj": "int8-g64-sym" for m in "qkv"},
    **{f"2.mlp.{m}_proj": "int4-g128-sym" for m in ("gate", "up")},
    "0.mlp.down_proj": "int4-g64-sym",
    "1.mlp.down_proj": "int4-g64-sym",
    "2.mlp.down_proj": "int2-g32-sym",
    "5.self_attn.o_proj": "int3-g64-sym",
}
FLOATS = {
    **{f"0.self_attn.{m}_proj": "nvfp4" for m in "qkv"},
    "1.mlp.down_proj": "nvfp4",
    "2.mlp.down_proj": "int8-row-sym",
    "3.mlp.down_proj": "int4-g128-sym",
    "4.mlp.down_proj": "int4-g64-sym",
    "4.self_attn.o_proj": "mxfp8",
    "5.self_attn.o_proj": "fp8",
}
MIXED = INTEGERS | {
    **{f"3.self_attn.{m}_proj": "nvfp4" for m in "qkv"},
    **{f"4.self_attn.{m}_proj": "mxfp4" for m in "qkv"},
    **{f"3.mlp.{m}_proj": "fp8" for m in ("gate", "up")},
    "3.mlp.down_proj": "mxfp8",
}
# (target, environment, package, file that the tool is given, policy)
TOOLS = [
    ("gptqmodel", "export", "gptqmodel", "quantize_config.json", INTEGERS),
    ("autoround", "export", "auto-round", "layer_config.json", INTEGERS),
    ("torchao", "export", "torchao", "quantization_config.json", INTEGERS),
    ("modelopt", "export", "nvidia-modelopt", "recipe.yaml", FLOATS),
    ("compressed-tensors", "llm-compressor", "llmcompressor", "recipe.yaml", MIXED),
]


def written(policy: Path, target: str, out: Path, *allowed: str) -> Path:
    export_policy(policy, target, out, allowed=allowed)
    return out


@pytest.mark.parametrize(
    ("target", "place", "package", "file", "formats"), TOOLS, ids=[row[0] for row in TOOLS]
)
def test_what_a_tool_saves_is_the_policy(
    environment: Any, record: Any, make_policy: Make, tmp_path: Path, target: str, place: str,
    package: str, file: str, formats: dict[str, str],
) -> None:  # fmt: skip
    tools, path = environment(place), make_policy(formats)
    config = written(path, target, tmp_path / "out", "ACT_QUANTIZED", "SCALE_SHARED") / file
    script = "llmcompressor" if place == "llm-compressor" else target
    saved = tmp_path / "saved"
    tools.run("export_quantize.py", script, builtin_folder("tiny"), config, saved,
              GPTQMODEL_CPU_WORKERS="2")  # fmt: skip
    saved = next(saved.rglob("config.json")).parent  # AutoRound makes a folder in it
    import_policy(saved, target, "tiny", tmp_path / "again.json", force=False)
    assert load_policy(tmp_path / "again.json").modules == load_policy(path).modules
    if target == "modelopt":
        policy = load_policy(path)
        predicted = policy.achieved.kept_bytes + sum(
            STORED[target].matrix(*module.shape, policy.format_of(tensor))
            for tensor, module in policy.modules.items()
        )
        assert tensor_bytes(saved / "model.safetensors") == predicted
    record(target, tools.version(package), "quantizes by our configuration, saved and imported",
           "the same policy")  # fmt: skip
    if target in ("gptqmodel", "autoround", "compressed-tensors"):
        furthest = unpacked_error(saved, load_policy(path))
        record(target, tools.version(package), "what it quantized, read by `--external`",
               f"within {furthest:.1f} steps of the weights, root mean square")  # fmt: skip


def unpacked_error(saved: Path, policy: Policy) -> float:
    """Root mean square error of a matrix in steps of its format, at most of all.

    A step is what codes of that many bits make of ±2.5 standard deviations; of floats, what
    the last bit of a weight of one standard deviation is worth.
    """
    layout, config, source = open_layout("tiny")
    original = load_model(source, dtype="float32").model
    found = open_unpacked(resolve(str(saved)), skeleton(config), "cpu")
    assert found is not None
    furthest = 0.0
    for matrix in (m for unit in layout.units for m in unit.matrices):
        format, weight = policy.format_of(matrix.name), original.get_parameter(matrix.name).detach()
        values = found.get_parameter(matrix.name)
        if format.exact:
            step = 2**-7
        elif format.kind == "int":
            read_back(values, format, matrix.name)
            step = 5 / 2**format.bits
        else:
            step = 2**-3 if format.bits == 8 else 2**-1
        error = float((values - weight).square().mean().sqrt()) / float(weight.std())
        furthest = max(furthest, error / step)
    # a zero point that is read one off moves all weights by a step
    assert furthest < 0.6
    return furthest


def test_bitsandbytes(environment: Any, record: Any, make_policy: Make, tmp_path: Path) -> None:
    tools = environment("export")
    modules = [f"{b}.{m}" for b in range(6) for m in ("mlp.down_proj", "self_attn.o_proj")]
    quantized = {f"model.layers.{name}" for name in modules[3:]}
    path = make_policy(dict.fromkeys(modules[3:], "nf4-g64"))
    out = written(path, "bitsandbytes", tmp_path / "out", "SCALE_FORMAT_CHANGED")
    found = tools.run("export_quantize.py", "bitsandbytes", builtin_folder("tiny"),
                      out / "quantization_config.json", "-")  # fmt: skip
    assert {name for name, kind in found.items() if kind == "Linear4bit"} == quantized
    record("bitsandbytes", tools.version("bitsandbytes"), "each module is looked up",
           "as in the policy")  # fmt: skip


def test_hqq(environment: Any, record: Any, make_policy: Make, tmp_path: Path) -> None:
    tools = environment("export")
    formats = {f"{b}.mlp.down_proj": "int4-g64-fz" for b in range(6)}
    formats |= {f"{b}.self_attn.o_proj": "int3-g32-fz" for b in range(6)}
    path = make_policy(formats)
    out = written(path, "hqq", tmp_path / "out")
    found = tools.run("export_quantize.py", "hqq", builtin_folder("tiny"),
                      out / "hqq_config.json", "-")  # fmt: skip
    assert found == {
        f"model.layers.{name}": [parse_format(text).bits, parse_format(text).group_size]
        for name, text in formats.items()
    }
    record("hqq", tools.version("hqq"), "each module is looked up", "as in the policy")


def test_caches_of_transformers(
    environment: Any, record: Any, fake: Any, make_policy: Make, tmp_path: Path
) -> None:
    tools, path = environment("export"), make_policy({})
    content = json.loads(path.read_text())
    widths = ("int8-g64", "int4-g32", "bf16", "int8-g32", "int4-g64", "bf16")
    content["kv_cache"] = {str(n): {"k": text, "v": text} for n, text in enumerate(widths)}
    path.write_text(json.dumps(content))
    out = written(path, "transformers-kv", tmp_path / "out")
    model = fake(path, "tiny")
    prompts = model.prompts(("The history of the first", "In the year of the"))
    kinds, found = tools.run("cache_tokens.py", builtin_folder("tiny"), out / "kv_cache.json",
                             json.dumps(prompts), 16)  # fmt: skip
    assert kinds == [8, 4, 16, 8, 4, 16]
    below = model.shortfall(prompts, found)
    record("transformers-kv", tools.version("transformers"), "a width for each layer: tokens",
           f"at most {below:.3f} logits below the best token of a 16-bit cache")  # fmt: skip
    assert below < 1
