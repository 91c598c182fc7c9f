"""`bitsearch front`: columns, knee, measured points, three objectives."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest

from bitsearch.fronts import indistinguishable, read_front


def test_measured_points_carry_what_was_measured(cli: Any, searched: Any) -> None:
    before = read_front(searched.run)
    assert sum(point["knee"] for point in before["points"]) == 1
    assert 0 < before["hypervolume"] <= 1
    content = cli("front", searched.run, "--measure", 5, "--format", "json").json
    points = content["points"]
    assert [point["choice"] for point in points] == [p["choice"] for p in before["points"]]
    measured = [index for index, point in enumerate(points) if point["kl"] is not None]
    assert len(measured) == 5 and {0, len(points) - 1} < set(measured)
    assert any(points[index]["knee"] for index in measured)
    assert sum(points[index]["measured_knee"] for index in measured) == 1
    for index in measured:
        point = points[index]
        assert point["kl_low"] <= point["kl"] <= point["kl_high"]
        beaten = any(
            points[other]["bytes"] < point["bytes"] and points[other]["kl"] <= point["kl"]
            for other in measured
        )
        assert point["measured_front"] == (not beaten)
        twin = point["same_as"]
        assert twin is None or (twin in measured and points[twin]["bytes"] <= point["bytes"])
    # 2 bits against 8 bits is no accident
    assert points[-1]["same_as"] is None and points[0]["same_as"] is None
    rows = list(csv.DictReader(cli("front", searched.run).out.splitlines()))
    assert [row["kl"] for row in rows] == [
        "" if point["kl"] is None else str(point["kl"]) for point in points
    ]


def test_measuring_again_gives_the_same_without_measuring(
    cli: Any, searched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli("front", searched.run, "--measure", 4).out
    from bitsearch.judge import Judge

    monkeypatch.setattr(Judge, "_record", lambda *_: pytest.fail("measured twice"))
    assert cli("front", searched.run, "--measure", 4).out == first


def test_two_kinds_of_budget_give_a_front_of_three(cli: Any, searched: Any) -> None:
    """Bytes of all and bytes of the linear layers, as bytes and milliseconds will be."""
    more = ("-b", "6bpw", "-b", "6bpw@linear", "--solver", "milp", "--diagnostics", 0)
    assert cli("search", searched.run, *more).code == 0
    content = cli("front", searched.run, "--format", "json").json
    assert content["costs"] == ["bytes", "linear_bytes"] and 0 < content["hypervolume"] <= 1
    points = np.array([[p["bytes"], p["linear_bytes"], p["damage"]] for p in content["points"]])
    for point in points:
        assert not ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
    assert len(np.unique(points[:, 0] - points[:, 1])) > 3  # no line: embeddings vary by themselves
    measured = cli("front", searched.run, "--measure", 3, "--format", "json").json["points"]
    assert sum(point["kl"] is not None for point in measured) == 3


def test_few_formats_leave_no_front_behind(cli: Any, searched: Any) -> None:
    assert (searched.run / "front.csv").exists()
    assert cli("search", searched.run, "-b", "5bpw", "--distinct", 2, "--solver", "milp",
               "--diagnostics", 0).code == 0  # fmt: skip
    assert "holds no front" in cli("front", searched.run).complaint(4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("points"),
        lambda content: content.update(points=[]),
        lambda content: content["points"][0].pop("choice"),
        lambda content: content["points"][0].update(choice=[0]),
        lambda content: content["points"][0].update(choice=[99] * len(content["points"][0])),
    ],
)
def test_damaged_front_is_one_line(damage: Any, cli: Any, searched: Any) -> None:
    path = searched.run / "front.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    assert "front.json" in cli("front", searched.run, "--measure", 2).complaint(4)


def test_twins_by_hand() -> None:
    """Bytes 1, 2, 3, 4. B is A plus noise around 0, C is lower in every window, D is C + noise.

    A−B: differences ±0.1 in turn, mean 0, so 0 lies inside any interval. C−A = −1 in each
    window, so the interval is [−1, −1]. D−A is about −1 too, D−C is ±0.1. So B is A's twin
    and D is C's, though D's bytes are more than B's.
    """
    wave = np.array([0.1, -0.1] * 8)
    a = np.full(16, 2.0)
    kl = np.array([a, a + wave, a - 1, a - 1 + wave])
    assert indistinguishable(np.array([[1.0], [2.0], [3.0], [4.0]]), kl) == [None, 0, None, 2]
    # in another order of the rows
    assert indistinguishable(np.array([[4.0], [1.0], [3.0], [2.0]]), kl[[3, 0, 2, 1]]) == [
        2, None, None, 1
    ]  # fmt: skip


def test_twins_cost_no_more_in_any_respect() -> None:
    """Equal KL, but each is the cheaper in one cost: neither stands for the other."""
    kl = np.tile([0.1, 0.2, 0.15], (2, 1))
    assert indistinguishable(np.array([[1.0, 9.0], [2.0, 3.0]]), kl) == [None, None]
    assert indistinguishable(np.array([[1.0, 3.0], [2.0, 3.0]]), kl) == [None, 0]


def test_one_window_tells_nothing() -> None:
    assert indistinguishable(np.array([[1.0], [2.0]]), np.array([[0.2], [0.2]])) == [None, None]
