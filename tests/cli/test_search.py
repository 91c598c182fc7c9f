"""`bitsearch search`, `front`, `eval` and `check`, end to end on real models."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitsearch.judge import Judge
from bitsearch.objectives import estimators
from bitsearch.policy import load_policy
from bitsearch.run import Journal

KEYS = {
    "model", "budget", "bytes", "bpw", "kl", "kl_ci", "perplexity", "reference_perplexity",
    "controls", "diagnostics", "solver", "measure_seconds", "peak_rss_bytes", "policy",
}  # fmt: skip
TINY = ("--length", "64", "--windows", "4,4,6", "--diagnostics", "3")


@pytest.fixture
def measured_cells(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every cell that an estimator is asked for from now on."""
    asked: list[Any] = []
    load = estimators.load_estimator

    def watched(name: str) -> Callable[..., Any]:
        estimate = load(name)

        def counting(scoring: Any, cells: Any) -> Any:
            asked.extend(cells)
            return estimate(scoring, cells)

        return counting

    monkeypatch.setattr("bitsearch.damage.load_estimator", watched)
    return asked


def check_result(found: dict[str, Any], run: Path) -> None:
    """What holds for every result of a search."""
    assert found.keys() >= KEYS
    # a limit on linear layers alone says nothing of the whole
    budgets = zip(found["budget"], found["limit_bytes"], strict=True)
    limit = min(limit for text, limit in budgets if "@linear" not in text)
    assert 0 < found["bytes"] <= limit
    assert found["kl_ci"][0] <= found["kl"] <= found["kl_ci"][1]
    assert found["perplexity"] > 1 and found["reference_perplexity"] > 1
    assert found["solver"].keys() >= {"name", "gap", "seconds"}
    assert found["peak_rss_bytes"] > 10**7 and found["measure_seconds"] >= 0
    for control in found["controls"]:
        assert control.keys() >= {"name", "bytes", "bpw", "kl", "kl_ci"}
        assert control["bytes"] <= limit
        assert control["difference"] == pytest.approx(found["kl"] - control["kl"])
    # What ships is the best of all contenders on selection text.
    ranking = {row["name"]: row["kl"] for row in found["selection"]}
    assert ranking[found["shipped"]] == min(ranking.values())
    assert {control["name"] for control in found["controls"]} <= ranking.keys()

    policy = load_policy(Path(found["policy"]))
    assert Path(found["policy"]).parent == run
    assert policy.achieved.bytes == found["bytes"]
    assert policy.damage.evaluation and policy.damage.evaluation.kl == found["kl"]
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(found))


def test_search_of_the_shipped_model(cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = cli("search", "tiny", "--budget", "4.5bpw", "--out", run, "--json", *TINY)
    found = outcome.json
    check_result(found, run)
    assert outcome.out.startswith("{") and outcome.out.endswith("}\n")
    names = {control["name"] for control in found["controls"]}
    assert {"uniform-int4-g64", "filled-g64", "first-last-g64", "random", "reversed"} <= names
    assert found["diagnostics"].keys() >= {"sigma", "ceiling", "additivity", "rank_correlation"}
    # Real text, a trained model: the search beats what knows nothing, and the ranking reversed.
    by_name = {control["name"]: control["kl"] for control in found["controls"]}
    assert found["kl"] < by_name["reversed"] and found["kl"] < by_name["random"]

    # The same windows through `eval` give the same held-out figures.
    again = cli("eval", "tiny", "--policy", found["policy"], "--text", "evaluation", "--length",
                "64", "--windows", "6", "--json").json  # fmt: skip
    for key in ("kl", "kl_ci", "perplexity", "reference_perplexity", "top1"):
        assert again[key] == pytest.approx(found[key], rel=1e-6), key
    assert again["bytes"] == found["bytes"]


def test_search_of_a_folder(cli: Any, place: Any) -> None:
    found = cli(*place.search(), "--json").json
    check_result(found, place.run)
    made = {path.name for path in place.run.iterdir()}
    assert made >= {"space.json", "tables", "policies", "policy.json", "front.csv", "front.json",
                    "result.json", "log.jsonl"}  # fmt: skip
    assert os.listdir(place.run / "tables") == ["fisher_output.safetensors"]
    assert not [name for name in made if name.startswith(".") and name != ".lock"]


def test_people_read_where_the_policy_is(cli: Any, searched: Any) -> None:
    outcome = cli("search", searched.run, "--budget", "4.5bpw", "--diagnostics", "3")
    assert outcome.code == 0
    # the path stands on one line, however long, to be copied
    assert f"policy: {searched.run / 'policy.json'}\n" in outcome.out
    assert "4.5bpw" in outcome.out and "random" in outcome.out


def test_the_same_search_writes_the_same_policy(cli: Any, place: Any, searched: Any) -> None:
    """Wherever the run lies; model and texts are at other paths here, the numbers equal."""
    found = cli(*place.search(), "--json").json
    one, other = (json.loads(p.read_text()) for p in (place.run / "policy.json",
                                                      searched.run / "policy.json"))  # fmt: skip
    assert one["modules"] == other["modules"] and one["achieved"] == other["achieved"]
    assert found["kl"] == searched.result["kl"]


def test_a_new_budget_measures_no_cell_again(
    cli: Any, searched: Any, measured_cells: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = searched.run / "tables" / "fisher_output.safetensors"
    before = table.read_bytes(), (searched.run / "policy.json").read_bytes()
    found = cli("search", searched.run, "--budget", "6bpw", "--diagnostics", "0", "--json").json
    check_result(found, searched.run)
    assert not measured_cells and table.read_bytes() == before[0]
    # the policy of the other budget is kept under its own name
    names = sorted(os.listdir(searched.run / "policies"))
    assert names == ["4.5bpw.json", "6bpw.json"]
    assert (searched.run / "policies" / "4.5bpw.json").read_bytes() == before[1]

    # And the old budget again measures nothing at all, not even a policy.
    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Judge, "_record", never)
    again = cli("search", searched.run, "--budget", "4.5bpw", "--diagnostics", "3", "--json").json
    assert again["kl"] == searched.result["kl"]
    assert (searched.run / "policy.json").read_bytes() == before[1]


def test_a_larger_budget_is_no_worse(cli: Any, searched: Any) -> None:
    sizes, kls = [], []
    for budget in ("3.5bpw", "5bpw", "8bpw", "0.9x"):
        found = cli("search", searched.run, "-b", budget, "--diagnostics", "0", "--json").json
        check_result(found, searched.run)
        sizes.append(found["bytes"])
        kls.append(found["selection"][0]["kl"])
    assert sizes == sorted(sizes) and kls[0] > kls[2] > kls[3]


def test_budgets_combine(cli: Any, searched: Any) -> None:
    found = cli("search", searched.run, "-b", "4bpw@linear", "-b", "6bpw", "--solver", "milp",
                "--diagnostics", "2", "--json").json  # fmt: skip
    check_result(found, searched.run)
    policy = load_policy(searched.run / "policy.json")
    assert policy.achieved.linear_bpw is not None and policy.achieved.linear_bpw <= 4
    assert policy.budgets == ["4bpw@linear", "6bpw"]


@pytest.mark.parametrize(
    "option, value, setting",
    [
        ("--length", "32", r"length=16, not length=32"),
        ("--windows", "4,4,5", r"windows.evaluation=6, not windows.evaluation=5"),
        ("--seed", "7", r"seed=0, not seed=7"),
        ("--dtype", "bfloat16", r"dtype='float32', not dtype='bfloat16'"),
        ("--candidates", "int4-g16", r"candidates="),
        ("--freeze", "lm_head=bf16", r"frozen.lm_head=None, not frozen.lm_head='bf16'"),
        ("--no-fuse", None, r"fuse=True, not fuse=False"),
        ("--calibration-text", "wiki", r"own_texts.calibration="),
    ],
)
def test_other_settings_need_another_run(
    cli: Any, searched: Any, option: str, value: str | None, setting: str
) -> None:
    before = {p: p.read_bytes() for p in searched.run.rglob("*") if p.is_file()}
    more = [option] if value is None else [option, value]
    line = cli("search", searched.run, "--budget", "4.5bpw", *more).complaint(4)
    assert "space.json was made with" in line and "use another --out" in line
    for part in setting.split(", not "):
        assert part in line
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_a_changed_text_or_model_is_noticed(cli: Any, place: Any) -> None:
    assert cli(*place.search()).code == 0
    text = place.text("evaluation")
    content = text.read_text()
    text.write_text(content.replace("w3", "w4"))
    line = cli(*place.search()).complaint(4)
    assert "corpora.json was made with evaluation.sha256=" in line
    text.write_text(content)
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.001}))
    assert "model.json was made with config_sha256=" in cli(*place.search()).complaint(4)


def test_front(cli: Any, searched: Any) -> None:
    rows = list(csv.DictReader(cli("front", searched.run).out.splitlines()))
    assert list(rows[0]) == ["bytes", "bpw", "damage", "knee"] and len(rows) > 5
    sizes = [int(row["bytes"]) for row in rows]
    damages = [float(row["damage"]) for row in rows]
    assert sizes == sorted(set(sizes)) and damages == sorted(damages, reverse=True)
    points = cli("front", searched.run, "--format", "json").json["points"]
    assert [point["bytes"] for point in points] == sizes
    policy = load_policy(searched.run / "policy.json")
    # every point is a policy: the bytes of its choice are those of the front
    space = json.loads((searched.run / "space.json").read_text())
    assert all(len(point["choice"]) == len(space["units"]) for point in points)
    assert policy.achieved.kept_bytes == space["kept_bytes"]
    assert "holds no front" in cli("front", searched.run.parent).complaint(4)
    assert "write csv or json" in cli("front", searched.run, "--format", "png").complaint(2)


def test_eval_reproduces_the_held_out_figures(cli: Any, searched: Any, tmp_path: Path) -> None:
    place, result = searched.place, searched.result
    asked = ("--text", place.text("evaluation"), "--length", "16", "--windows", "6", "--json")
    policy = searched.run / "policy.json"
    for path in (policy, searched.run / "policies" / "4.5bpw.json"):
        found = cli("eval", place.model, "--policy", path, *asked).json
        assert found["kl"] == pytest.approx(result["kl"], rel=1e-6)
        assert found["reference_perplexity"] == pytest.approx(result["reference_perplexity"])

    # A policy moves together with its statistics.
    away = tmp_path / "away"
    away.mkdir()
    shutil.copy(policy, away)
    line = cli("eval", place.model, "--policy", away / "policy.json", *asked).complaint(4)
    assert "statistics.safetensors" in line and "--statistics" in line
    statistics = searched.run / "statistics.safetensors"
    given = cli("eval", place.model, "--policy", away / "policy.json", "--statistics", statistics,
                *asked).json  # fmt: skip
    shutil.copy(statistics, away)
    beside = cli("eval", place.model, "--policy", away / "policy.json", *asked).json
    assert given["kl"] == beside["kl"] == pytest.approx(result["kl"], rel=1e-6)
    (away / "statistics.safetensors").write_bytes(b"something else")
    line = cli("eval", place.model, "--policy", away / "policy.json", *asked).complaint(4)
    assert "is not the calibration that" in line


def test_eval_of_the_model_itself(cli: Any, searched: Any) -> None:
    place = searched.place
    found = cli("eval", place.model, "--text", place.text("evaluation"), "--length", "16",
                "--windows", "6", "--json").json  # fmt: skip
    assert found["kl"] == pytest.approx(0, abs=1e-7) and found["top1"] == 1.0
    assert found["policy"] is None and found["perplexity"] == found["reference_perplexity"]
    assert found["perplexity"] == pytest.approx(searched.result["reference_perplexity"])
    two = cli(
        "eval",
        place.model,
        "--text",
        place.text("common"),
        "--text",
        place.text("selection"),
        "--length",
        "16",
        "--windows",
        "5",
        "--json",
    ).json
    assert len(two["texts"]) == 2 and two["tokens"] == 80


def test_eval_refuses_a_policy_of_another_model(cli: Any, searched: Any) -> None:
    line = cli("eval", "tiny", "--policy", searched.run / "policy.json", "--text",
               "evaluation").complaint(4)  # fmt: skip
    assert "model.config_sha256=" in line


def test_measure_then_search(cli: Any, place: Any, measured_cells: list[Any]) -> None:
    """Tables may be made beforehand, several in one run."""
    arguments = [str(a) for a in place.search()]
    cut = arguments.index("--diagnostics")
    common = [arguments[1], *arguments[4:cut], *arguments[cut + 2 :]]
    for name in ("weight_error", "fisher_output"):
        found = cli("measure", *common, "--damage", name, "--json").json
        assert found["units"] * found["candidates"] == len(measured_cells)
        assert Path(found["table"]).name == f"{name}.safetensors"
        measured_cells.clear()
    found = cli(*place.search("4.5bpw", "--damage", "weight_error", "--json")).json
    assert not measured_cells and found["bytes"] <= found["limit_bytes"][0]
    assert load_policy(place.run / "policy.json").damage.estimator == "weight_error"


def test_check_of_good_files(cli: Any, searched: Any) -> None:
    run = searched.run
    found = cli("check", run, "--json").json
    assert found["kind"] == "run" and found["tables"] == ["fisher_output"]
    assert found["policies"] == 2
    assert found["records"] == len(Journal(run / "evaluations.journal").records) > 10
    assert cli("check", run / "policy.json", "--json").json["bytes"] == searched.result["bytes"]
    table = cli("check", run / "tables" / "fisher_output.safetensors", "--json").json
    assert (table["kind"], table["estimator"]) == ("table", "fisher_output")
    plain = cli("check", run)
    assert plain.code == 0 and plain.out == f"{run}: run, valid\n"


def test_check_reads_only(cli: Any, searched: Any) -> None:
    """Also a torn journal stays as it is: another process may be writing it."""
    journal = searched.run / "evaluations.journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    before = {p: p.read_bytes() for p in searched.run.rglob("*") if p.is_file()}
    assert cli("check", searched.run).code == 0
    assert {p: p.read_bytes() for p in searched.run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name",
    [
        "space.json", "policy.json", "front.json", "result.json", "corpora.json", "model.json",
        "policies/4.5bpw.json", "tables/fisher_output.safetensors", "statistics.safetensors",
        "evaluations.journal",
    ],
)  # fmt: skip
def test_check_names_the_broken_file(cli: Any, searched: Any, name: str) -> None:
    path = searched.run / name
    raw = path.read_bytes()
    path.write_bytes(b"\0" * 20 + raw[20:])
    assert name.rpartition("/")[2] in cli("check", searched.run).complaint(4)
    path.write_bytes(raw[: len(raw) // 2])
    outcome = cli("check", searched.run)
    if name == "evaluations.journal":  # half a journal is a run that was stopped there
        assert outcome.code == 0
    else:
        assert name.rpartition("/")[2] in outcome.complaint(4)


def test_check_refuses_what_is_nothing_of_ours(cli: Any, tmp_path: Path) -> None:
    assert "is not a run directory" in cli("check", tmp_path).complaint(4)
    assert "cannot be read" in cli("check", tmp_path / "missing").complaint(4)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not JSON" in cli("check", tmp_path / "notes.txt").complaint(4)
