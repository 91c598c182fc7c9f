"""The profile file: what is written is read, and damage is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitsearch.errors import BadInput
from bitsearch.kernels.profile_file import (
    Cell,
    Header,
    Protocol,
    check_machine,
    load_profile,
    profile_text,
)

MACHINE = {"name": "Some CPU", "cores": "4 cores", "features": "abc"}


def header(cells: int) -> Header:
    """A header of a table with so many cells."""
    return Header(
        tool="bitsearch 0",
        date="2026-01-01",
        device="ggml",
        machine=MACHINE,
        facts={},
        kernels="ggml 0",
        calibration={"launch_us": 1.0},
        protocol=Protocol(clock="thread", threads=1, rotation_bytes=1, rounds=3, seed=0),
        sentinel=None,
        model="tiny",
        model_type="llama",
        load=(0.0, 0.0),
        seconds=1.0,
        cells=cells,
    )


def cell(m: int = 1, median: float = 2.0) -> Cell:
    """A cell of one launch."""
    return Cell(
        op="linear", m=m, k=256, segments=[(64, "gguf-q4_0")], kernel="q4_0", activations="int8",
        median_us=median, p25_us=1.5, p75_us=2.5, min_us=1.0, n=9, bytes=9, fixed=0.1, error=0.01,
        status="ok",
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A profile of two cells."""
    found = tmp_path / "profile.jsonl"
    found.write_text(profile_text(header(2), [cell(1), cell(16)]))
    return found


def test_what_is_written_is_read(path: Path) -> None:
    profile = load_profile(path)
    assert profile.header == header(2) and profile.cells == [cell(1), cell(16)]
    assert profile.cells[0].launch.n == 64 and profile.header.use == "unchecked"


def test_damage_is_named_by_its_line(path: Path) -> None:
    lines = path.read_text().splitlines()
    cases = {
        "line 1 is not JSON": ["{", *lines[1:]],
        "line 2: median_us": [lines[0], lines[1].replace("2.0", "-2.0", 1), lines[2]],
        "line 3 is not JSON": [*lines[:2], lines[2][:-20]],
        "line 2: cell: Value error, min, p25": [
            lines[0], lines[1].replace('"median_us":2.0', '"median_us":9.0'), lines[2],
        ],
        "holds 1 cells, its header says 2": lines[:2],
        "line 2: op": [lines[0], json.dumps({"surprise": 1}), lines[2]],
        "has schema None": ["{}"],
    }  # fmt: skip
    for complaint, damaged in cases.items():
        path.write_text("\n".join(damaged) + "\n")
        with pytest.raises(BadInput) as refused:
            load_profile(path)
        assert complaint in str(refused.value) and "\n" not in str(refused.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not text"):
        load_profile(path)
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_profile(path)


class Here:
    """What a device tells of where it is."""

    def __init__(self, **differences: str) -> None:
        self._machine = MACHINE | differences

    def machine(self) -> dict[str, str]:
        return self._machine

    def source(self) -> str:
        return "ggml 0"


def test_another_machine_is_refused_and_both_are_named(path: Path) -> None:
    profile = load_profile(path)
    here: Any = Here()
    check_machine(profile, here, path)
    other: Any = Here(name="Other CPU")
    with pytest.raises(BadInput) as refused:
        check_machine(profile, other, path)
    message = str(refused.value)
    assert "Some CPU" in message and "Other CPU" in message and "differ in name" in message
