"""Recipe files: those that ship, a user's own, and broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_formats
from bitsearch.recipes import load_recipe, recipe_names, resolve

GOOD = """
title = "Mine"
source = "my notes"
candidates = "int{4,8}-g64"
damage = "kl"
solver = "greedy"
budget = ["4.5bpw"]
calibration_windows = 7
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_whole(name: str) -> None:
    """It names its source and what differs, and sets everything a search needs."""
    recipe = load_recipe(name)
    assert recipe.title and recipe.source and recipe.differs
    assert recipe.candidates is not None and len(parse_formats(recipe.candidates)) >= 2
    assert None not in (recipe.fuse, recipe.quantizer, recipe.damage, recipe.solver)


def test_own_file_fills_what_the_user_left_out(own: Path) -> None:
    used, stored = resolve(str(own), {"damage": None, "solver": None, "budget": [], "length": 64})
    assert (used["damage"], used["solver"], used["budget"]) == ("kl", "greedy", ["4.5bpw"])
    assert (used["length"], used["windows"]) == (64, "7,16,32")
    assert stored["overridden"] == []
    assert (stored["title"], stored["candidates"]) == ("Mine", "int{4,8}-g64")


def test_what_the_user_gives_wins_and_is_named(own: Path) -> None:
    given = {"damage": "fisher_output", "solver": "greedy", "budget": ["80MB"], "fuse": False}
    used, stored = resolve(str(own), given)
    assert used["damage"] == "fisher_output" and used["budget"] == ["80MB"]
    assert used["candidates"] == "int{4,8}-g64" and used["fuse"] is False
    assert stored["overridden"] == ["budget", "damage"]
    assert stored["damage"] == "fisher_output"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown recipe 'hawk'; known: .*hawq-v3"):
        load_recipe("hawk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title", "titel"), "Field required|Extra inputs"),
        (('"kl"', '"vibes"'), "damage: unknown 'vibes'; known: kl"),
        (('"greedy"', '"simplex"'), "solver: unknown 'simplex'"),
        (("int{4,8}-g64", "int9"), "candidates: unknown format 'int9'"),
        (("= 7", "= 0"), "calibration_windows: Input should be greater"),
        (("= 7", '= "7"'), "calibration_windows: Input should be a valid integer"),
        (('["4.5bpw"]', '"4.5bpw"'), "budget: Input should be a valid list"),
        (("title =", "title"), "no TOML"),
    ],
)
def test_bad_files_say_what_is_wrong(own: Path, change: tuple[str, str], message: str) -> None:
    own.write_text(GOOD.replace(*change))
    with pytest.raises(BadInput, match=message) as caught:
        load_recipe(str(own))
    assert str(own) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_recipe(str(tmp_path / "none.toml"))


def test_a_name_cannot_leave_the_folder() -> None:
    with pytest.raises(UsageError, match="unknown recipe"):
        load_recipe("../settings")
