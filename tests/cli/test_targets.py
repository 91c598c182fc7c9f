"""`--target` narrows a search, counts the target's bytes, and sticks to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitsearch.policy import load_policy
from bitsearch.targets import load_target

TARGET = """
title = "an engine of four bits"
source = "made up"
exporter = "compressed-tensors"
stored = "compressed-tensors"
fuse = true
[[runs]]
formats = "int4-g8-sym,int4-g4-sym"
"""


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "engine.toml"
    path.write_text(TARGET)
    return path


def test_a_search_yields_what_its_target_runs(
    cli: Any, place: Any, engine: Path, tmp_path: Path
) -> None:
    asked = ("--candidates", "int{2,3,4}-g{4,8}-sym,bf16", "--target", engine)
    found = cli(*place.search("9bpw", *asked, "--json")).json
    policy = load_policy(place.run / "policy.json")
    assert set(policy.formats) <= {"int4-g4-sym", "int4-g8-sym", "bf16"} and len(policy.formats) > 1
    assert policy.formats["bf16"] and policy.modules["model.embed_tokens.weight"].format == "bf16"

    # the budget is in the bytes that the target's file holds
    assert policy.target is not None and policy.target.bytes == found["bytes"]
    assert found["bytes"] <= found["limit_bytes"][0] and found["bytes"] > policy.achieved.bytes
    told = cli("export", place.run / "policy.json", "--to", "compressed-tensors", "--model",
               place.model, "--out", tmp_path / "out", "--json").json  # fmt: skip
    assert told["losses"] == []
    assert told["tensor_bytes"] == told["predicted_bytes"] == found["bytes"]

    # resumed: the same, or refused
    again = cli("search", place.run, "--budget", "9bpw", "--diagnostics", "3", "--json").json
    assert again["bytes"] == found["bytes"]
    line = cli("search", place.run, "--budget", "9bpw", "--target", "vllm").complaint(4)
    assert "target=" in line and "'vllm'" in line


def test_a_policy_for_another_engine_is_refused_by_unit(
    cli: Any, searched: Any, tmp_path: Path
) -> None:
    """The search of the fixture knew of no engine: 3 bits, groups of 16."""
    policy = searched.run / "policy.json"
    modules = json.loads(policy.read_text())["modules"]
    three = next(
        name
        for name, module in modules.items()
        if module["format"] == "int3-g16" and module["shape"][1] % 16 == 0 and "embed" not in name
    )
    line = cli("export", policy, "--to", "vllm", "--out", tmp_path / "out").complaint(2)
    codes = line.partition("--allow-loss ")[2].partition(", or")[0]
    assert "WIDTH_UNSERVED" in codes and "model." in line
    done = cli("export", policy, "--to", "vllm", "--out", tmp_path / "out", "--allow-loss", codes,
               "--json").json  # fmt: skip
    lost = {(loss["code"], loss["module"]) for loss in done["losses"]}
    assert ("WIDTH_UNSERVED", three) in lost
    line = cli("export", policy, "--to", "portable", "--out", tmp_path / "other").complaint(2)
    assert "portable has no files of its own" in line


def test_a_target_that_fuses_refuses_unfused_units(cli: Any, place: Any) -> None:
    line = cli("plan", place.model, "--budget", "5bpw", "--target", "vllm", "--no-fuse")
    assert "vllm fuses q/k/v and gate/up: leave --no-fuse away" in line.complaint(2)
    line = cli(*place.search("5bpw", "--target", "vllm", "--no-fuse")).complaint(2)
    assert "leave --no-fuse away" in line


def test_runs_from_before_targets_have_none(cli: Any, searched: Any) -> None:
    space = searched.run / "space.json"
    content = json.loads(space.read_text())
    assert content["settings"].pop("target") == "portable"
    assert "external" not in content["settings"]
    space.write_text(json.dumps(content))
    found = cli("search", searched.run, "--budget", "5bpw", "--diagnostics", "0", "--json").json
    assert found["target"] == "none"


def test_a_plan_counts_the_bytes_of_the_target(cli: Any) -> None:
    own, other = (
        cli("plan", "tiny", "--budget", "8bpw", "--candidates", "int4-g64-sym,bf16",
            "--target", target, "--json").json
        for target in ("portable", "vllm")
    )  # fmt: skip
    assert own["range"]["bytes"][1] == other["range"]["bytes"][1]
    assert other["candidates"][0]["units"] == len(other["units"]) - 1
    formats = {row["name"] for row in cli("plan", "tiny", "--budget", "8bpw", "--target", "vllm",
                                          "--json").json["candidates"]}  # fmt: skip
    assert formats == {
        f.name for rule in load_target("vllm").runs for f in rule.parsed if f.group_size
    } | {"bf16"}
