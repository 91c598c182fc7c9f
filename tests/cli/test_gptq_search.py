"""Searches with other quantizers than the default, and their policies afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file


def test_gptq_from_search_to_eval(cli: Any, place: Any) -> None:
    found = cli(*place.search("4.5bpw", "--quantizer", "gptq"), "--json")
    told = [line for line in found.err.splitlines() if "not seen" in line]
    assert len(told) == 1 and "model.embed_tokens.weight" in told[0]
    stored = load_file(place.run / "statistics.safetensors")
    moments = {name for name in stored if name.endswith(":second_moment")}
    assert len(moments) == 2 * 4 + 1  # q/k/v, o, gate/up, down; the head

    asked = ("--text", place.text("evaluation"), "--length", "16", "--windows", "6", "--json")
    again = cli("eval", place.model, "--policy", place.run / "policy.json", *asked).json
    assert again["kl"] == pytest.approx(found.json["kl"], rel=1e-6)
    assert cli("check", place.run, "--json").json["kind"] == "run"

    plain = shutil.copytree(place.run, place.path / "plain")
    text = (plain / "policy.json").read_text()
    (plain / "policy.json").write_text(text.replace('"gptq"', '"rtn"'))
    other = cli("eval", place.model, "--policy", plain / "policy.json", *asked).json
    assert other["kl"] != pytest.approx(found.json["kl"], rel=1e-3)


def test_too_few_tokens_for_error_feedback_are_told(cli: Any, place: Any) -> None:
    few = cli(*place.search("4.5bpw", "--quantizer", "gptq", "--windows", "1,1,1"))
    assert "calibration tokens, fewer than the" in few.err
    shutil.rmtree(place.run)
    enough = cli(*place.search("4.5bpw", "--quantizer", "gptq", "--windows", "8,1,1"))
    assert "fewer than" not in enough.err
    shutil.rmtree(place.run)
    assert "fewer than" not in cli(*place.search("4.5bpw", "--windows", "1,1,1")).err


def test_gptq_needs_a_file_with_second_moments(cli: Any, searched: Any) -> None:
    policy: Path = searched.run / "policy.json"
    policy.write_text(policy.read_text().replace('"rtn"', '"gptq"'))
    asked = ("--text", searched.place.text("evaluation"), "--length", "16", "--windows", "2")
    line = cli("eval", searched.place.model, "--policy", policy, *asked).complaint(4)
    assert "statistics.safetensors holds no second moments" in line


def test_gptq_refuses_block_types_of_ggml(cli: Any, place: Any) -> None:
    arguments = list(place.search("12bpw", "--quantizer", "gptq"))
    arguments[arguments.index("--candidates") + 1] = "gguf-q8_0,bf16"
    line = cli(*arguments).complaint(2)
    assert "'gptq' cannot round into gguf-q8_0" in line


def test_a_table_measured_first_is_that_of_the_search(cli: Any, place: Any) -> None:
    """`measure` and `search` take the same quantizer, and refuse another one on the same run."""
    formats = ("--candidates", "int{3,4}-g16-fz,bf16")
    asked = list(place.search("6bpw", "--quantizer", "hqq", *formats))
    shared = asked[1:]
    for option in ("--budget", "--diagnostics"):
        at = shared.index(option)
        del shared[at : at + 2]
    cli("measure", *shared)
    table = place.run / "tables" / "fisher_output.safetensors"
    measured = table.read_bytes()
    assert "quantizer='hqq'" in cli(*place.search("6bpw", *formats)).complaint(4)
    found = cli(*asked, "--json").json
    assert table.read_bytes() == measured and found["kl"] > 0
    assert json.loads((place.run / "policy.json").read_text())["quantizer"]["method"] == "hqq"
