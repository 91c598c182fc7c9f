"""Time of a model from a table: sums of launches, and a line for what the table lacks."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_formats
from bitsearch.kernels.profile_file import Profile, load_profile
from bitsearch.kernels.regime import Regime, launch_of, parse_regime
from bitsearch.models.load import open_layout
from bitsearch.objectives.cost.latency import Latency, latency
from bitsearch.profile import check_profile, make_profile
from bitsearch.testing_devices import Clockwork
from bitsearch.units import ModelLayout

FORMATS = "int4-g32,int8-g32,bf16"
REGIMES = [Regime("decode", 1, 64), Regime("decode", 1, 256), Regime("prefill", 1, 32)]
PATH = Path("clock.jsonl")


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    """A device whose 8 bits are faster than its 4."""
    device = Clockwork({"int4-g32": 1.0, "int8-g32": 0.75, "bf16": 2.0})
    monkeypatch.setattr("bitsearch.profile.open_device", lambda *_: device)
    return device


@pytest.fixture
def made(clockwork: Clockwork, tmp_path: Path) -> Path:
    """The clockwork's table of `tiny`."""
    path = tmp_path / PATH
    make_profile(
        "tiny", path, REGIMES, device="clockwork", threads=1, candidates=None, revision=None,
        rounds=3, seed=0, progress=lambda *_: None,
    )  # fmt: skip
    return path


def looked_up(profile: Profile, regime: str, formats: str = FORMATS) -> Latency:
    """Times of `tiny` in a regime."""
    layout = tiny()
    candidates = parse_formats(formats)
    allowed = np.ones((len(layout.units), len(candidates)), bool)
    return latency(profile, PATH, layout, candidates, allowed, parse_regime(regime))


def tiny() -> ModelLayout:
    """The layout of `tiny`."""
    return open_layout("tiny")[0]


def test_a_step_is_its_launches_and_a_rest(made: Path, clockwork: Clockwork) -> None:
    found = looked_up(load_profile(made), "batch=1,context=64")
    units, names = tiny().units, FORMATS.split(",")
    exact = [
        [clockwork.nanoseconds(launch_of(unit, name, REGIMES[0])) for name in names]
        for unit in units
    ]
    assert np.abs(found.nanoseconds - np.array(exact)).max() <= 1
    assert found.rest == pytest.approx(clockwork.rest, abs=1)
    choice = np.arange(len(units)) % 3
    total = sum(row[c] for row, c in zip(exact, choice, strict=True)) + clockwork.rest
    assert found.total(choice) == pytest.approx(total, abs=len(units))
    assert found.runs.all() and not found.notes


def test_prefill_multiplies_all_rows_but_those_of_the_head(
    made: Path, clockwork: Clockwork
) -> None:
    found = looked_up(load_profile(made), "prefill=32")
    decode = looked_up(load_profile(made), "batch=1,context=64")
    head = [unit.kind for unit in tiny().units].index("embedding")
    assert (found.nanoseconds[head] == decode.nanoseconds[head]).all()
    others = np.arange(len(found.nanoseconds)) != head
    assert (found.nanoseconds[others] > decode.nanoseconds[others]).all()


def test_between_timed_contexts_the_rest_is_a_line(made: Path, clockwork: Clockwork) -> None:
    profile = load_profile(made)
    cells = [
        cell.model_copy(update={"median_us": 100.0, "p75_us": 100.0}) if cell.context == 256
        else cell for cell in profile.cells
    ]  # fmt: skip
    profile = Profile(header=profile.header, cells=cells)
    found = looked_up(profile, "batch=1,context=160")
    assert found.rest == pytest.approx((clockwork.rest + 100_000) / 2, rel=1e-6)
    assert found.notes == ("rest of a step between timed contexts",)
    assert "beyond" in looked_up(profile, "batch=1,context=1000").notes[0]


def test_what_was_not_timed_is_refused_by_name(made: Path) -> None:
    profile = load_profile(made)
    cases = {
        "batch=4": r"no step of batch=4,context=256, but of batch=1,context=64, batch=1,context",
        "prefill=64": r"no step of prefill=64",
    }
    for regime, complaint in cases.items():
        with pytest.raises(BadInput, match=complaint):
            looked_up(profile, regime)
    with pytest.raises(BadInput, match=r"no time of int2-g32 at .*--candidates int2-g32"):
        looked_up(profile, "batch=1,context=64", "int4-g32,int2-g32")
    few = Profile(
        header=profile.header,
        cells=[
            cell.model_copy(update={"status": "unsupported", "why": "there is none"})
            if cell.op == "linear" else cell for cell in profile.cells
        ],
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"no candidate of model.embed_tokens .4096 × 256. has a"):
        looked_up(few, "batch=1,context=64")


def test_rows_between_timed_ones_are_interpolated_and_told(made: Path) -> None:
    profile = load_profile(made)
    gone = {1024}  # gate and up: 256, 512 and 4096 rows of 256 stay
    cells = [cell for cell in profile.cells if cell.op == "rest" or cell.launch.n not in gone]
    found = looked_up(Profile(header=profile.header, cells=cells), "batch=1,context=64")
    whole = looked_up(profile, "batch=1,context=64")
    # the clockwork's times are lines in the rows
    assert np.abs(found.nanoseconds - whole.nanoseconds).max() <= 1
    assert len(found.notes) == 3 and "lies between timed row counts" in found.notes[0]


def test_a_check_compares_whole_models_with_the_table(made: Path, clockwork: Clockwork) -> None:
    found = check_profile(made, None, revision=None, seed=0, progress=lambda *_: None)
    assert found["use"] == "time" and len(found["checks"]) == len(REGIMES)
    for check in found["checks"]:
        names = [row["name"] for row in check["configurations"]]
        assert {f"uniform-{name}" for name in FORMATS.split(",")} <= set(names)
        assert sum(name.startswith("random-") for name in names) >= 20
        assert check["mean_error"] < 1e-6 and check["spearman"] > 0.999
    # the file keeps it
    assert load_profile(made).header.use == "time"


def varying(formats: Any) -> float:
    """From 0.97 to 1.03, another for every policy."""
    return 0.97 + 0.06 * (zlib.crc32(repr(sorted(formats.items())).encode()) / 2**32)


@pytest.mark.parametrize(
    ("rates", "factor", "use"),
    [
        ((1.0, 0.75, 2.0), lambda _: 1.3, "ranking only"),
        ((1.0, 1.001, 1.002), varying, "times only"),
        ((1.0, 1.001, 1.002), lambda formats: 1.3 * varying(formats), "neither"),
    ],
)
def test_a_check_says_what_a_table_is_good_for(
    clockwork: Clockwork, tmp_path: Path, rates: Any, factor: Any, use: str
) -> None:
    clockwork.rate = dict(zip(FORMATS.split(","), rates, strict=True))
    path = tmp_path / "other.jsonl"
    make_profile(
        "tiny", path, REGIMES, device="clockwork", threads=1, candidates=None, revision=None,
        rounds=1, seed=0, progress=lambda *_: None,
    )  # fmt: skip
    clockwork.factor = factor
    found = check_profile(path, None, revision=None, seed=0, progress=lambda *_: None)
    assert found["use"] == use == load_profile(path).header.use


def test_another_machine_is_refused(made: Path, clockwork: Clockwork) -> None:
    clockwork.identity = {"name": "another"}
    with pytest.raises(BadInput, match=r"of another machine \(clockwork, .*this one is another"):
        check_profile(made, None, revision=None, seed=0, progress=lambda *_: None)
