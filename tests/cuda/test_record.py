"""Records of a GPU are of the kernels in this tree, or say so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitsearch.kernels import launches
from bitsearch.kernels.nvrtc import source_hash
from bitsearch.kernels.profile_file import load_profile

RESULTS = Path(__file__).parents[2] / "experiments" / "gpu" / "results"
LIMIT = {"float16": 1e-3, "bfloat16": 8e-3, "int8": 8e-3}
TELL = (
    "experiments/gpu/README.md names, after 'Of other kernels:', the records of other kernels "
    "than those in the tree, and no others; to make them again: experiments/gpu/run.py"
)


def record(name: str) -> dict[str, Any]:
    """One step's record."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def said_stale() -> set[str]:
    """Records that the page says are of other kernels than those in the tree."""
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Of other kernels: (.*)\.$", page, re.MULTILINE)
    return set() if line == "none" else set(line.replace("`", "").split(", "))


NAMES = ["calibration", "conformance", "correctness", "counters", "grid", "kinds", "peers",
         "sanitizer", "search", "search_llama", "segments", "stack", "tuning"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_record_is_of_these_kernels(name: str) -> None:
    found = record(name)
    assert found["before"]["name"].startswith("NVIDIA")
    assert found["before"]["driver_version"]
    tuned = {
        f"{units},{bits}": [how.warps, how.stages, how.resident]
        for (units, bits), how in launches.TUNED.items()
    }
    ours = (found["source"], found["tuned"]) == (source_hash(), tuned)
    assert ours is (name not in said_stale()), TELL


def test_every_kernel_was_right_on_a_gpu() -> None:
    rows = record("correctness")["rows"]
    assert all(row["ok"] and row["error"] < LIMIT[row["dtype"]] for row in rows)
    names = {row["name"] for row in rows}
    for bits in range(1, 9):
        for size in (32, 64, 128, None):
            assert {f"int{bits}-{size}-{symmetric}" for symmetric in (True, False)} <= names
    assert all("0 errors" in row["output"] for row in record("sanitizer")["rows"])


@pytest.mark.parametrize("m", [1, 16])
def test_stack_is_predicted_by_its_launches(m: int) -> None:
    rows = [row for row in record("stack")["rows"] if "predicted_us" in row and row["m"] == m]
    errors = [abs(row["predicted_us"] / row["us"] - 1) for row in rows]
    assert len(rows) >= 6
    assert sum(errors) / len(errors) < 0.05


@pytest.mark.parametrize("model", ["gemma3-270m", "llama3-8b"])
def test_a_table_of_a_gpu_predicts_whole_models(model: str) -> None:
    header = load_profile(RESULTS / f"profile-{model}.jsonl").header
    assert header.device == "cuda" and header.use == "times only"
    assert header.sentinel is not None and header.sentinel.drift < 0.03
    assert header.in_step is not None and header.in_step.used
    assert all(check.mean_error < 0.01 and check.worst_error < 0.04 for check in header.checks)
    ours = header.kernels == source_hash()[:16]
    assert ours is (f"profile-{model}" not in said_stale()), TELL


@pytest.mark.parametrize("name", ["search", "search_llama"])
def test_policies_found_under_a_time_keep_it(name: str) -> None:
    rows = record(name)["rows"]
    assert {row["regime"] for row in rows} == {"batch=1", "batch=64"}
    for row in rows:
        assert abs(row["predicted_us"] / row["measured_us"] - 1) < 0.03
        if row["by"] in ("time", "both"):
            assert row["measured_us"] < 1.01 * row["budget_us"]
