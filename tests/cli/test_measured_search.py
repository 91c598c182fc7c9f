"""`search --solver` with solvers that call the real loss."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from bitsearch.run import Journal

# Four windows of sixteen tokens are one pass.
TOKENS = ("--tokens", 6 * 64)


def chosen(run: Any) -> Any:
    """The policy's modules."""
    return json.loads((run / "policy.json").read_text())["modules"]


@pytest.mark.parametrize("solver", ["evolution", "multipliers_tpe", "random"])
def test_search_measures_on_calibration_text_and_keeps_the_budget(cli, place, solver):
    found = cli(*place.search("3.5bpw", "--solver", solver, *TOKENS, "--json")).json
    assert found["bytes"] <= found["limit_bytes"][0]
    assert found["solver"]["name"] == solver and found["solver"]["gap"] is None
    assert {"searched", "additive"} & {row["name"] for row in found["selection"]}
    calibration = json.loads((place.run / "corpora.json").read_text())["calibration"]["sha256"]
    losses = Journal(place.run / "losses.journal").records
    assert losses and {record["corpus"] for record in losses} == {calibration}


def test_a_search_that_is_repeated_measures_nothing_again(cli, place):
    arguments = place.search("3.5bpw", "--solver", "evolution", *TOKENS, "--json")
    first = cli(*arguments).json
    before = (place.run / "losses.journal").read_bytes()
    policy = chosen(place.run)
    assert cli(*arguments).json["kl"] == first["kl"]
    assert (place.run / "losses.journal").read_bytes() == before
    assert chosen(place.run) == policy


def test_half_of_the_losses_lost_changes_nothing(cli, place):
    """What a killed search leaves behind is a prefix of its journal."""
    arguments = place.search("3.5bpw", "--solver", "evolution", *TOKENS, "--json")
    cli(*arguments)
    policy = chosen(place.run)
    journal = place.run / "losses.journal"
    whole = journal.read_bytes()
    for part in (0.2, 0.5, 0.9):
        journal.write_bytes(whole[: int(part * len(whole))])
        for name in ("policy.json", "result.json"):
            (place.run / name).unlink()
        cli(*arguments)
        assert journal.read_bytes() == whole
        assert chosen(place.run) == policy


def test_the_study_is_kept_in_the_run_or_where_the_user_says(cli, place, tmp_path):
    cli(*place.search("3.5bpw", "--solver", "tpe", "--tokens", 128))
    elsewhere = tmp_path / "shared.db"
    cli(*place.search("3.5bpw", "--solver", "tpe", "--tokens", 128, "--storage",
                      f"sqlite:///{elsewhere}"))  # fmt: skip
    names = []
    for path in (place.run / "study.db", elsewhere):
        with sqlite3.connect(path) as database:
            names += [name for (name,) in database.execute("SELECT study_name FROM studies")]
    assert len(names) == 2 and names[0] == names[1] and names[0].startswith("tpe-")


def test_a_bad_storage_is_one_line(cli, place):
    found = cli(*place.search("3.5bpw", "--solver", "tpe", "--storage", "nowhere"))
    assert "'nowhere'" in found.complaint(2)


def test_several_budgets_are_refused_before_anything_is_measured(cli, place):
    found = cli(*place.search("3.5bpw", "--budget", "5bpw@linear", "--solver", "evolution"))
    assert "takes one budget" in found.complaint(2)
    assert not (place.run / "tables").exists()


def test_an_impossible_budget_is_refused_before_anything_is_measured(cli, place):
    assert "bpw" in cli(*place.search("0.5bpw", "--solver", "evolution")).complaint(3)
    assert not (place.run / "tables").exists()
