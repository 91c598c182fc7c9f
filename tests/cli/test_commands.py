"""Listing, planning, and what the command says of itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bitsearch
from bitsearch.budget import parse_budget
from bitsearch.formats import parse_format, parse_formats
from bitsearch.models.load import open_layout
from bitsearch.settings import DEFAULT_CANDIDATES
from bitsearch.solvers import SOLVERS
from bitsearch.space import make_space

HELP = """
import sys
sys.argv = ["bitsearch", *sys.argv[1:]]
from bitsearch.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(sorted({"torch", "transformers", "scipy"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], ["search"], ["plan"], ["eval"], ["check"], ["list"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: " in done.stdout and done.stderr == "[]\n"


def test_the_installed_command_and_the_module_are_the_same(tmp_path: Path) -> None:
    """A real process: help on stdout, the exit code of an error, one line on stderr."""
    command = [sys.executable, "-m", "bitsearch"]
    bad = subprocess.run(
        [*command, "plan", "nothing-here", "--budget", "4bpw"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert bad.returncode == 4 and not bad.stdout
    assert bad.stderr.startswith("bitsearch: no model 'nothing-here'")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "kind", ["estimators", "solvers", "formats", "quantizers", "models", "exporters"]
)
def test_lists_are_objects_with_a_name(cli: Any, kind: str) -> None:
    rows = cli("list", kind, "--json").json
    assert rows and all(row["name"] and row["about"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    plain = cli("list", kind).out.splitlines()
    assert [line.split()[0] for line in plain] == [row["name"] for row in rows]


def test_lists_name_what_the_options_take(cli: Any) -> None:
    for row in cli("list", "formats", "--json").json:
        assert parse_format(row["name"]).name == row["name"]
    assert {row["name"] for row in cli("list", "solvers", "--json").json} >= SOLVERS.keys()
    assert "tiny" in {row["name"] for row in cli("list", "models", "--json").json}
    assert "write one of estimators, solvers" in cli("list", "colours").complaint(2)


def test_plan_needs_no_weights(cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(Path(bitsearch.__file__).parent / "builtin" / "tiny", folder)
    (folder / "model.safetensors").unlink()
    found = cli("plan", folder, "--budget", "4.5bpw", "--budget", "0.3x", "--json").json
    assert found["parameters"] == sum(unit["parameters"] for unit in found["units"]) + (
        found["kept_bytes"] // 2
    )
    space = make_space(open_layout("tiny")[0], parse_formats(DEFAULT_CANDIDATES))
    assert tuple(found["range"]["bytes"]) == space.byte_range()
    assert [b["bytes"] for b in found["budgets"]] == [
        parse_budget(text, space).limit for text in ("4.5bpw", "0.3x")
    ]
    sizes = {row["name"]: row["bytes"] for row in found["candidates"]}
    assert sizes["bf16"] == found["bytes_16bit"] == 2 * found["parameters"]
    assert sizes["int4-g128"] < sizes["int4-g64"] < sizes["int5-g128"]
    fits = found["budgets"][0]["uniform"]
    assert sizes[fits] <= found["budgets"][0]["bytes"]
    assert all(size <= sizes[fits] or size > found["budgets"][0]["bytes"]
               for size in sizes.values())  # fmt: skip
    for cost in ("seconds_fisher_output", "seconds_kl", "seconds_check", "memory_bytes"):
        assert found["cost"][cost] > 0


def test_plan_for_people(cli: Any) -> None:
    outcome = cli("plan", "tiny", "--budget", "4.5bpw", "--units")
    assert outcome.code == 0 and not outcome.err
    assert "achievable: " in outcome.out and "fits everywhere" in outcome.out
    found = cli("plan", "tiny", "--budget", "4.5bpw", "--json").json
    for unit in found["units"]:
        assert unit["name"] in outcome.out


def test_plan_takes_the_options_of_a_search(cli: Any) -> None:
    asked = ("plan", "tiny", "--budget", "5bpw", "--json")
    fused, apart = cli(*asked).json, cli(*asked, "--no-fuse").json
    assert len(apart["units"]) > len(fused["units"])
    assert apart["parameters"] == fused["parameters"]
    narrow = cli(*asked, "--candidates", "int4-g64,int8-g64").json
    assert [row["name"] for row in narrow["candidates"]] == ["int4-g64", "int8-g64"]
    frozen = cli(*asked, "--freeze", "*=int4-row", "--budget", f"{10**9}B")
    assert frozen.code == 3


def test_plan_refuses_budgets_out_of_range(cli: Any) -> None:
    low = cli("plan", "tiny", "--budget", "1bpw").complaint(3)
    assert "below the achievable range" in low and "bpw with these candidates" in low
    assert "above the achievable range" in cli("plan", "tiny", "--budget", "2x").complaint(3)
    assert "is not a budget" in cli("plan", "tiny", "--budget", "much").complaint(2)
