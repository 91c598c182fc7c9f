"""Weights of another tool as candidates: the same numbers, and what cannot be them refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

FORMATS = ("--candidates", "int{3,4}-g16,bf16")
ALL = "0.013536MB"  # of the model with every matrix in int4-g16
ASKED = ("--length", "16", "--windows", "6", "--json")


@pytest.fixture
def theirs(cli: Any, place: Any, tmp_path: Path) -> Path:
    """Every matrix of the model in int4-g16, as float32 values in a folder."""
    assert cli(*place.search(ALL, *FORMATS, "--freeze", "*=int4-g16")).code == 0
    policy, out = place.run / "policy.json", tmp_path / "theirs"
    formats = {row["format"] for row in json.loads(policy.read_text())["modules"].values()}
    assert formats == {"int4-g16"}
    cli("quantize", place.model, "--policy", policy, "--out", out, "--dtype", "float32")
    shutil.rmtree(place.run)
    return out


def rewritten(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_same_weights_give_the_same_search(cli: Any, place: Any, theirs: Path) -> None:
    """Ours of one format, written and read back; the other format is still rounded here."""
    own = cli(*place.search("5bpw", *FORMATS), "--json").json
    shutil.rmtree(place.run)
    read = ("--external", f"int4-g16={theirs}")
    found = cli(*place.search("5bpw", *FORMATS, *read), "--json").json
    assert (found["kl"], found["bytes"]) == (own["kl"], own["bytes"])
    policy = place.run / "policy.json"
    content = json.loads(policy.read_text())
    assert content["quantizer"]["external"]["int4-g16"]["path"] == str(theirs)
    assert "int3-g16" in content["formats"]
    text = ("--text", place.text("evaluation"), *ASKED)
    measured = cli("eval", place.model, "--policy", policy, *text).json
    assert measured["kl"] == pytest.approx(found["kl"], rel=1e-6)
    out = place.path / "out"
    cli("quantize", place.model, "--policy", policy, "--out", out, "--dtype", "float32")
    assert cli("eval", out, "--reference", place.model, *text).json["kl"] == measured["kl"]
    told = ("quantize", place.model, "--policy", policy, "--out", place.path / "p", "--packed")
    assert "cannot be packed" in cli(*told).complaint(4)


def test_codes_that_another_tool_packed_are_read(cli: Any, place: Any, tmp_path: Path) -> None:
    """Ours as compressed-tensors holds them; the embedding is none of its matrices."""
    asked = ("--candidates", "int4-row,bf16", "--freeze", "model.embed_tokens=bf16")
    own = cli(*place.search("8bpw", *asked), "--json").json
    policy, packed = tmp_path / "policy.json", tmp_path / "packed"
    everything = ("--freeze", "model.layers.*=int4-row", "--freeze", "model.embed_tokens=bf16")
    shutil.rmtree(place.run)
    assert cli(*place.search("8bpw", "--candidates", "int4-row,bf16", *everything)).code == 0
    shutil.copy(place.run / "policy.json", policy)
    told = ("--model", place.model, "--to", "compressed-tensors", "--out", packed)
    statistics = next(place.run.glob("*.safetensors"))
    assert cli("export", policy, *told, "--statistics", statistics).code == 0
    shutil.rmtree(place.run)
    found = cli(*place.search("8bpw", *asked, "--external", f"int4-row={packed}"), "--json").json
    assert (found["kl"], found["bytes"]) == (own["kl"], own["bytes"])


def test_other_weights_give_another_result(
    cli: Any, place: Any, theirs: Path, tmp_path: Path
) -> None:
    """Values scaled by a tool, and rounded to bfloat16, are taken as they are."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() > 1:
                tensors[name] = tensor.mul(1.05).bfloat16().float()

    scaled = rewritten(theirs, tmp_path / "scaled", change)
    asked = (*FORMATS, "--freeze", "*=int4-g16")
    own = cli(*place.search(ALL, *asked), "--json").json
    shutil.rmtree(place.run)
    read = ("--external", f"int4-g16={scaled}")
    found = cli(*place.search(ALL, *asked, *read), "--json").json
    assert found["bytes"] == own["bytes"] and found["kl"] > own["kl"]
    # the files are part of the run
    rewritten(scaled, tmp_path / "again", lambda tensors: tensors["model.norm.weight"].add_(1e-5))
    shutil.copy(tmp_path / "again" / "model.safetensors", scaled)
    line = cli("search", place.run, "--budget", ALL).complaint(4)
    assert "sha256" in line and str(scaled) in line


def test_what_is_not_in_the_format_is_refused(
    cli: Any, place: Any, theirs: Path, tmp_path: Path
) -> None:
    def refusal(format: str, folder: Path) -> str:
        line: str = cli(
            *place.search("16bpw", *FORMATS, "--external", f"{format}={folder}")
        ).complaint(4)
        shutil.rmtree(place.run, ignore_errors=True)
        return line

    assert "is not in int3-g16: one of its groups holds" in refusal("int3-g16", theirs)

    def more_norm(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"] *= 2

    def infinite(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.inf

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:, :16].contiguous()

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors["other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    for index, (change, words) in enumerate(
        [
            (more_norm, "input_layernorm.weight' is not that of the model"),
            (infinite, "holds NaN or infinite weights"),
            (cut, "up_proj.weight' has shape [40, 16]"),
            (renamed, "up_proj"),
        ]
    ):
        folder = rewritten(theirs, tmp_path / f"changed{index}", change)
        assert words in refusal("int4-g16", folder)


def test_bad_requests(cli: Any, place: Any, theirs: Path, tmp_path: Path) -> None:
    def complaint(code: int, *more: object) -> str:
        found: str = cli(*place.search("6bpw", *FORMATS, *more)).complaint(code)
        assert not place.run.exists()
        return found

    assert "FORMAT=CHECKPOINT" in complaint(2, "--external", str(theirs))
    assert "it is no candidate" in complaint(2, "--external", f"int5-g16={theirs}")
    assert "keeps weights as they are" in complaint(2, "--external", f"bf16={theirs}")
    assert "unknown format" in complaint(2, "--external", f"int4={theirs}")
    assert "no model" in complaint(4, "--external", f"int4-g16={tmp_path / 'nothing'}")
    twice = ("--external", f"int4-g16={theirs}") * 2
    assert "twice" in complaint(2, *twice)
    prepared = ("--external", f"int4-g16={theirs}", "--prepare", "awq")
    assert "--prepare" in complaint(2, *prepared)
