"""`search --recipe`: named recipes and one's own, overridden, stored, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

OWN = """
title = "Mine"
source = "notes"
candidates = "int{2,4}-g16"
fuse = false
damage = "weight_error"
solver = "greedy"
budget = ["4.5bpw"]
"""


def arguments(place: Any, *more: object) -> tuple[object, ...]:
    """A quick search without candidates or a budget of its own."""
    texts = [a for p in ("calibration", "selection", "evaluation")
             for a in (f"--{p}-text", place.text(p))]  # fmt: skip
    return ("search", place.model, "--out", place.run, *texts, "--length", "16",
            "--windows", "4,4,6", "--diagnostics", "0", *more)  # fmt: skip


def test_own_recipe_sets_every_part_and_is_stored(cli: Any, place: Any, tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text(OWN)
    found = cli(*arguments(place, "--recipe", own, "--json")).json
    assert found["budget"] == ["4.5bpw"] and found["solver"]["name"] == "greedy"
    assert found["recipe"]["title"] == "Mine" and found["recipe"]["overridden"] == []
    assert json.loads((place.run / "recipe.json").read_text()) == found["recipe"]
    space = json.loads((place.run / "space.json").read_text())
    assert space["candidates"] == ["int2-g16", "int4-g16"]
    assert any(unit["name"].endswith("q_proj") for unit in space["units"])  # not fused
    policy = json.loads((place.run / "policy.json").read_text())
    assert policy["damage"]["estimator"] == "weight_error"
    assert policy["provenance"]["recipe"] == str(own)


def test_command_line_overrides_a_named_recipe(cli: Any, place: Any) -> None:
    more = ("--recipe", "hawq-v3", "--budget", "6bpw", "--damage", "weight_error",
            "--candidates", "int{4,8}-g16")  # fmt: skip
    found = cli(*arguments(place, *more, "--json")).json
    assert found["recipe"]["overridden"] == ["candidates", "damage"]
    assert found["recipe"]["damage"] == "weight_error" and found["solver"]["name"] == "milp"
    assert found["bpw"] <= 6
    shown = cli(*arguments(place, *more)).out
    assert "recipe hawq-v3: HAWQ-V3 (2021); changed: candidates, damage" in shown


@pytest.mark.parametrize("name", ["amq", "evopress"])
def test_recipes_that_search_on_the_real_loss(name: str, cli: Any, place: Any) -> None:
    more = ("--recipe", name, "--budget", "4.5bpw", "--candidates", "int{2,3,4}-g16")
    found = cli(*arguments(place, *more, "--tokens", "200", "--json")).json
    assert found["recipe"]["overridden"] == ["candidates"]
    assert found["bpw"] <= 4.5 and found["solver"]["gap"] is None
    assert (place.run / "losses.journal").exists()


def test_recipes_are_listed(cli: Any) -> None:
    rows = {row["name"]: row for row in cli("list", "recipes", "--json").json}
    assert rows["hawq-v3"]["solver"] == "milp" and "ICML" in rows["hawq-v3"]["source"]
    assert "hawq-v1 " in cli("list", "recipes").out


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 4, "cannot be read"),
        ("title = ", 4, "is no TOML"),
        (OWN.replace("greedy", "simplex"), 4, "solver: unknown 'simplex'"),
        (OWN.replace("budget", "bugdet"), 4, "bugdet: Extra inputs"),
        (OWN.replace('budget = ["4.5bpw"]', ""), 2, "no budget given"),
        (OWN.replace("4.5bpw", "0.1bpw"), 3, "achievable range"),
    ],
)
def test_bad_recipes_are_refused_in_a_line(
    content: str | None, code: int, message: str, cli: Any, place: Any, tmp_path: Path
) -> None:
    own = tmp_path / "mine.toml"
    if content is not None:
        own.write_text(content)
    assert message in cli(*arguments(place, "--recipe", own)).complaint(code)
    assert not place.run.exists() or not (place.run / "recipe.json").exists()


def test_unknown_recipe_lists_the_known(cli: Any, place: Any) -> None:
    assert "hawq-v3" in cli(*arguments(place, "--recipe", "hawk")).complaint(2)


def test_other_settings_than_the_runs_are_refused(cli: Any, place: Any, tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text(OWN)
    assert cli(*arguments(place, "--recipe", own)).code == 0
    message = cli("search", place.run, "--recipe", "hawq-v3", "--budget", "6bpw").complaint(4)
    assert "candidates" in message and "int4-row-sym" in message
