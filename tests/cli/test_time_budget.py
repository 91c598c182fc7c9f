"""Searches under a budget of time: kept when measured, repaired when missed, told in the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitsearch.kernels.devices import DEVICES
from bitsearch.policy import load_policy
from bitsearch.testing_devices import Clockwork

Cli = Callable[..., Any]
REGIME = "batch=1,context=32"
FORMATS = "int2-g16,int3-g16,int4-g16,int8-g16,bf16"


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    """A device whose 4 bits are the slowest of all but 16, and whose 2 bits have no kernel."""
    device = Clockwork(
        {"int3-g16": 1.0, "int4-g16": 1.6, "int8-g16": 1.2, "bf16": 3.0}, launch=100.0, rest=5e3
    )
    monkeypatch.setitem(DEVICES, "clockwork", "unused")
    for module in ("profile", "timed"):
        monkeypatch.setattr(f"bitsearch.{module}.open_device", lambda *_: device)
    return device


@pytest.fixture
def table(cli: Cli, place: Any, clockwork: Clockwork, tmp_path: Path) -> Path:
    """The clockwork's table for the model."""
    path = tmp_path / "clock.jsonl"
    found = cli(
        "profile", "--shapes", place.model, "--device", "clockwork", "--candidates", FORMATS,
        "--batch", "1", "--context", "32", "--out", path, "--json",
    )  # fmt: skip
    assert found.json["use"] == "unchecked" and found.json["device"] == "clockwork"
    return path


def search(place: Any, table: Path | None, *budgets: str, more: tuple[object, ...] = ()) -> Any:
    """Arguments of a search under budgets."""
    arguments = place.search(budgets[0], *(a for b in budgets[1:] for a in ("--budget", b)))
    arguments = (*arguments[: arguments.index("--candidates")], "--candidates", FORMATS, "--json")
    given = () if table is None else ("--latency", table)
    return (*arguments, *(a for b in budgets[1:] for a in ("--budget", b)), *given, *more)


def slowest(cli: Cli, place: Any, table: Path) -> tuple[float, float]:
    """The achievable range of milliseconds, as the refusal of an impossible budget tells it."""
    message = cli(*search(place, table, f"0.001ms@{REGIME}")).complaint(3)
    assert "is below the achievable range" in message
    low, high = message.partition("range: ")[2].split(" ms")[0].split(" to ")
    return float(low), float(high)


def test_a_policy_keeps_its_time_and_says_so(
    cli: Cli, place: Any, table: Path, clockwork: Clockwork
) -> None:
    low, high = slowest(cli, place, table)
    limit = round((low + high) / 2, 4)
    found = cli(*search(place, table, f"{limit}ms@{REGIME}")).json
    (entry,) = found["latency"]
    assert entry["measured_ms"] <= limit and entry["predicted_ms"] <= limit
    assert entry["measured_ms"] == pytest.approx(entry["predicted_ms"], rel=1e-4)
    assert entry["regime"] == REGIME and entry["device"] == "clockwork"
    policy = load_policy(place.run / "policy.json")
    assert policy.latency is not None and policy.latency[0].measured_ms == entry["measured_ms"]
    formats = {module.format for module in policy.modules.values()}
    # without a kernel; and slower than 8 bits, for more damage
    assert not formats & {"int2-g16", "int4-g16"}
    assert all(row["ms"][REGIME] <= limit for row in found["controls"])
    # a second search reads its measurements and ends the same
    clockwork.factor = lambda _: 9.0
    assert cli(*search(place, table, f"{limit}ms@{REGIME}")).json["latency"] == [entry]


def test_time_and_bytes_hold_together(cli: Cli, place: Any, table: Path) -> None:
    low, high = slowest(cli, place, table)
    limit = round((low + high) / 2, 4)
    found = cli(*search(place, table, "7bpw", f"{limit}ms@{REGIME}")).json
    assert found["solver"]["name"] == "milp" and found["bpw"] <= 7
    assert found["latency"][0]["measured_ms"] <= limit
    front = (place.run / "front.csv").read_text().splitlines()
    assert front[0].startswith("bytes,bpw,ms,damage")
    points = [[float(part) for part in line.split(",")[:4]] for line in front[1:]]
    assert len({point[0] for point in points}) > 5 and len({point[2] for point in points}) > 5


def test_a_time_chooses_other_formats_than_bytes(cli: Cli, place: Any, table: Path) -> None:
    def formats() -> set[str]:
        return {m.format for m in load_policy(place.run / "policy.json").modules.values()}

    low, high = slowest(cli, place, table)
    by_ms = cli(*search(place, table, f"{(2 * low + high) / 3:.4f}ms@{REGIME}")).json
    by_time = formats()
    by_bytes = cli(*search(place, None, "5.5bpw")).json
    assert by_bytes["latency"] == [] and by_ms["latency"]
    # 4 bits are fewer bytes than 8, and slower
    assert "int4-g16" in formats() and "int4-g16" not in by_time and "int8-g16" in by_time


def test_a_missed_promise_is_repaired(
    cli: Cli, place: Any, table: Path, clockwork: Clockwork
) -> None:
    low, high = slowest(cli, place, table)
    limit = round((low + 2 * high) / 3, 4)
    clockwork.factor = lambda formats: 1.2 if "int8-g16" in formats.values() else 1.0
    found = cli(*search(place, table, f"{limit}ms@{REGIME}")).json
    assert found["latency"][0]["measured_ms"] <= limit
    names = {row["name"] for row in found["selection"]}
    assert "searched" not in names and any("-repaired-" in name for name in names)


def test_without_any_policy_in_time_nothing_is_shipped(
    cli: Cli, place: Any, table: Path, clockwork: Clockwork
) -> None:
    low, high = slowest(cli, place, table)
    clockwork.factor = lambda _: 10.0
    message = cli(*search(place, table, f"{(low + high) / 2:.4f}ms@{REGIME}")).complaint(3)
    assert "no policy keeps the time when its steps are measured" in message
    assert not (place.run / "policy.json").exists()


def test_another_machine_needs_estimated(
    cli: Cli, place: Any, table: Path, clockwork: Clockwork
) -> None:
    low, high = slowest(cli, place, table)
    budget = f"{(low + high) / 2:.4f}ms@{REGIME}"
    clockwork.identity = {"name": "something else"}
    message = cli(*search(place, table, budget)).complaint(4)
    assert "of another machine (clockwork" in message and "something else" in message
    found = cli(*search(place, table, budget, more=("--estimated",))).json
    (entry,) = found["latency"]
    assert entry["measured_ms"] is None and entry["predicted_ms"] <= float(budget.split("ms")[0])


def test_an_estimated_table_plans_for_a_device_that_is_not_here(
    cli: Cli, place: Any, tmp_path: Path
) -> None:
    path = tmp_path / "roofline.jsonl"
    numbers = "launch_us=2,read_gbps=1,gflops=1000"
    made = ("profile", "--shapes", place.model, "--batch", "1", "--context", "32", "--out", path)
    shown = cli(*made, "--estimate", numbers, "--candidates", FORMATS)
    assert "not measured" in shown.out, shown.err
    budget = f"0.08ms@{REGIME}"
    assert "is estimated; add --estimated" in cli(*search(place, path, budget)).complaint(4)
    found = cli(*search(place, path, budget, more=("--estimated",))).json
    assert found["latency"][0]["measured_ms"] is None
    # two blocks of eight small launches and four large ones, and the head
    assert found["latency"][0]["predicted_ms"] >= (16 + 8 + 1) * 2e-3
    assert "needs --candidates" in cli(*made[:-1], tmp_path / "x", "--estimate", numbers).complaint(
        2
    )
    wrong = (*made[:-1], tmp_path / "x", "--candidates", FORMATS, "--estimate", "speed=1")
    assert "write launch_us=2" in cli(*wrong).complaint(2)


def test_without_a_table_the_run_makes_its_own(cli: Cli, place: Any, clockwork: Clockwork) -> None:
    found = cli(*search(place, None, f"1ms@{REGIME}"))
    assert "above the achievable range" in found.complaint(3)
    assert (place.run / "profile.jsonl").is_file()


@pytest.mark.parametrize(
    ("budget", "code", "complaint"),
    [
        ("1ms@batch=4,context=32", 4, "no step of batch=4,context=32"),
        ("1ms@sometimes", 2, "'sometimes' is no regime"),
        ("1ms@linear", 2, "'linear' is no regime"),
        ("1bpw@batch=1", 2, "is not a budget"),
        ("5kg", 2, "is not a budget"),
    ],
)
def test_bad_times_are_refused_in_a_line(
    cli: Cli, place: Any, table: Path, budget: str, code: int, complaint: str
) -> None:
    assert complaint in cli(*search(place, table, budget)).complaint(code)


def test_options_of_time_without_a_time_are_refused(cli: Cli, place: Any, table: Path) -> None:
    assert "need a budget of time" in cli(*search(place, table, "5bpw")).complaint(2)
    message = cli(*search(place, None, "1ms", more=("--estimated",))).complaint(2)
    assert "--estimated needs a table" in message
    assert "plan tells bytes" in cli("plan", place.model, "--budget", "1ms").complaint(2)


def test_what_has_no_kernel_is_refused_by_name(cli: Cli, place: Any, table: Path) -> None:
    arguments = list(search(place, table, f"1ms@{REGIME}"))
    arguments[arguments.index(FORMATS)] = "int2-g16"
    message = cli(*arguments).complaint(2)
    assert "no candidate of model.embed_tokens" in message and "int2-g16" in message
