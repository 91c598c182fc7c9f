"""Searches on prepared models, and their policies afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitsearch.models.preparation import load_preparation

ASKED = ("--length", "16", "--windows", "6", "--json")


def scores(cli: Any, place: Any, *arguments: object) -> tuple[float, float, int]:
    found = cli("eval", *arguments, "--text", place.text("evaluation"), *ASKED).json
    return found["kl"], found["perplexity"], found["bytes"]


def tie(model: Path) -> None:
    """Make head and embedding one matrix."""
    opened = AutoModelForCausalLM.from_pretrained(model)
    opened.config.tie_word_embeddings = True
    opened.tie_weights()
    opened.save_pretrained(model)
    with safe_open(model / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in set(stored.keys())


@pytest.mark.parametrize(("name", "tied"), [("awq", False), ("hadamard", True)])
def test_from_search_to_checkpoints(
    name: str, tied: bool, cli: Any, place: Any, tmp_path: Path
) -> None:
    """A tied head is untied by rotation, and stays so in what is written."""
    if tied:
        tie(place.model)
    found = cli(*place.search("6bpw", "--prepare", name, "--quantizer", "gptq"), "--json").json
    planned = cli("plan", place.model, "--budget", "6bpw", "--prepare", name, "--json").json
    assert [row["bytes"] for row in planned["budgets"]] == found["limit_bytes"]
    policy = place.run / "policy.json"
    content = json.loads(policy.read_text())
    made = content["quantizer"]["preparation"]
    assert made["method"] == name and ("lm_head.weight" in content["modules"])
    measured = scores(cli, place, place.model, "--policy", policy)
    assert measured[0] == pytest.approx(found["kl"], rel=1e-5) and measured[2] == found["bytes"]

    again = cli(*place.search("6bpw", "--prepare", name, "--quantizer", "gptq"), "--json").json
    assert again["kl"] == found["kl"]

    packed, exact = tmp_path / "packed", tmp_path / "exact"
    told = cli("quantize", place.model, "--policy", policy, "--out", packed, "--packed", "--json")
    assert told.json["policy_bytes"] == found["bytes"]
    cli("quantize", place.model, "--policy", policy, "--out", exact, "--dtype", "float32")
    for checkpoint in ((packed,), (exact, "--reference", place.model)):
        assert scores(cli, place, *checkpoint)[0] == pytest.approx(measured[0], rel=1e-3)

    # without it, the same policy is worse or cannot be read at all
    plain = content | {"quantizer": content["quantizer"] | {"preparation": None}}
    (place.run / "plain.json").write_text(json.dumps(plain))
    if not tied:
        other = scores(cli, place, place.model, "--policy", place.run / "plain.json")
        assert other[0] != pytest.approx(measured[0], rel=1e-3)


def test_the_preparation_must_be_the_same(cli: Any, place: Any, tmp_path: Path) -> None:
    cli(*place.search("6bpw", "--prepare", "awq"))
    assert "prepare='awq'" in cli(*place.search("6bpw")).complaint(4)
    policy = place.run / "policy.json"
    told = ("eval", place.model, "--policy", policy, "--text", place.text("evaluation"), *ASKED)
    away = tmp_path / "policy.json"
    shutil.copy(policy, away)
    line = cli(*told[:3], away, *told[4:]).complaint(4)
    assert "preparation 'preparation.safetensors'" in line and "--statistics" in line
    statistics = place.run / "statistics.safetensors"
    assert cli(*told[:3], away, *told[4:], "--statistics", statistics).code == 0
    assert cli("check", place.run, "--json").json["kind"] == "run"
    (place.run / "preparation.safetensors").write_bytes(statistics.read_bytes())
    assert "preparation.safetensors has schema None" in cli("check", place.run).complaint(4)
    assert "is not the preparation" in cli(*told).complaint(4)


def test_bad_requests(cli: Any, place: Any) -> None:
    line = cli(*place.search("6bpw", "--prepare", "magic")).complaint(2)
    assert "unknown preparation 'magic'; known: awq, hadamard, resq" in line
    line = cli(*place.search("6bpw", "--prepare", "awq", "--dtype", "bfloat16")).complaint(2)
    assert "needs --dtype float32" in line
    assert not place.run.exists()
    rows = {row["name"]: row["about"] for row in cli("list", "preparations", "--json").json}
    assert "scales" in rows["awq"] and "rotation" in rows["hadamard"]


def test_exports_are_of_the_prepared_model(cli: Any, place: Any, tmp_path: Path) -> None:
    """Without the weights that is a loss; with them they are those that were measured."""
    asked = ("--prepare", "awq", "--candidates", "int4-g16-sym,int8-g16-sym,bf16")
    assert cli(*place.search("9bpw", *asked)).code == 0
    policy, out = place.run / "policy.json", tmp_path / "out"
    told = ("export", policy, "--to", "compressed-tensors", "--out", out)
    losses = ("--allow-loss", "EMBED_DROPPED,HEAD_DROPPED,WIDTH_PROMOTED")
    assert "awq becomes none (PREPARATION_DROPPED)" in cli(*told, *losses).complaint(2)
    found = cli(*told, *losses, "--model", place.model)
    assert found.code == 0, found.err
    norm = "model.layers.0.input_layernorm.weight"
    theirs = load_file(out / "model.safetensors")[norm]
    prepared = load_preparation(place.run / "preparation.safetensors")
    plain = load_file(place.model / "model.safetensors")[norm]
    assert not torch.equal(theirs.float(), plain.bfloat16().float())
    assert torch.equal(theirs.float(), prepared.changed(norm, plain).bfloat16().float())
