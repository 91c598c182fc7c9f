"""Times inside of steps: what lone launches miss is found, and noise is not taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitsearch.kernels.profile_file import Cell, load_profile
from bitsearch.kernels.regime import Regime
from bitsearch.objectives.cost.in_step import corrected
from bitsearch.profile import check_profile, make_profile
from bitsearch.testing_devices import Clockwork

REGIMES = [Regime("decode", 1, 64), Regime("decode", 1, 256), Regime("prefill", 1, 32)]


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    """A device whose launches take longer inside a step than alone."""
    device = Clockwork({"int4-g32": 1.0, "int8-g32": 0.75, "bf16": 2.0})
    monkeypatch.setattr("bitsearch.profile.open_device", lambda *_: device)
    return device


def profile(folder: Path) -> Path:
    """The clockwork's table of `tiny`."""
    path = folder / "profile.jsonl"
    make_profile(
        "tiny", path, REGIMES, device="clockwork", threads=1, candidates=None, revision=None,
        rounds=1, seed=0, progress=lambda *_: None,
    )  # fmt: skip
    return path


def cell(kernel: str, alone: float, rows: int, op: str = "linear") -> Cell:
    """A cell of so many microseconds."""
    where = {"context": 64, "phase": "decode"} if op == "rest" else {}
    return Cell.model_validate(
        {
            "op": op, "m": 1, "k": 64, "segments": [(rows, kernel)] if rows else [],
            "kernel": kernel, "activations": "", "median_us": alone, "p25_us": alone,
            "p75_us": alone, "min_us": alone, "n": 1, "bytes": 1, "fixed": 0, "error": 0,
            "status": "ok", **where,
        }
    )  # fmt: skip


CELLS = [
    *(cell("quick", time, rows) for rows, time in enumerate((2.0, 3.0, 7.0, 20.0), 1)),
    *(cell("slow", time, rows) for rows, time in enumerate((4.0, 9.0, 30.0), 10)),
    cell("", 100.0, 0, "rest"),
]


def steps(seed: int, count: int = 40) -> np.ndarray:
    """How often each of `CELLS` is in steps."""
    found = np.random.default_rng(seed).integers(0, 9, (count, len(CELLS))).astype(float)
    found[:, -1] = 1
    return found


def test_a_launch_that_takes_longer_in_a_step_is_predicted_there(
    tmp_path: Path, clockwork: Clockwork
) -> None:
    clockwork.inside = lambda alone: 3_000 + 0.2 * alone
    path = profile(tmp_path)
    found = load_profile(path).header.in_step
    assert found is not None and found.used and found.steps == 2 * 27
    assert found.alone_error > 0.05 and found.fitted_error < 1e-6
    checked = check_profile(path, None, revision=None, seed=0, progress=lambda *_: None)
    assert checked["use"] == "time"
    for check in checked["checks"]:
        assert check["worst_error"] < 1e-6 and check["spearman"] > 0.999


def test_lone_times_that_add_up_stay(tmp_path: Path, clockwork: Clockwork) -> None:
    made = load_profile(profile(tmp_path))
    assert made.header.in_step is not None and not made.header.in_step.used
    assert all(cell.step_us is None and cell.adds_us == cell.median_us for cell in made.cells)


def test_every_kernel_has_its_own_line() -> None:
    counts = steps(0)
    alone = np.array([cell.median_us for cell in CELLS])
    added = np.array([*(1 + 0.1 * alone[:4]), *(-2 + 0.5 * alone[4:7]), 12.0])
    found, how = corrected(CELLS, counts, counts @ (alone + added))
    assert [cell.step_us for cell in found] == pytest.approx(alone + added, rel=1e-6)
    assert how.used and how.steps == 40


def test_steps_that_only_vary_correct_nothing() -> None:
    counts, noise = steps(1, 24), np.random.default_rng(2).normal(1, 0.05, 24)
    alone = np.array([cell.median_us for cell in CELLS])
    found, how = corrected(CELLS, counts, counts @ alone * noise)
    assert found == CELLS and not how.used


def test_the_error_is_that_of_steps_left_out() -> None:
    counts, noise = steps(3, 30), np.random.default_rng(4).normal(1, 0.01, 30)
    alone = np.array([cell.median_us for cell in CELLS])
    measured = counts @ (1.3 * alone + 2) * noise
    _, how = corrected(CELLS, counts, measured)
    missed = []
    for out in range(30):
        kept = np.arange(30) != out
        found, _ = corrected(CELLS, counts[kept], measured[kept])
        predicted = counts[out] @ np.array([cell.adds_us for cell in found])
        missed.append(1 - predicted / measured[out])
    assert how.fitted_error == pytest.approx(np.sqrt(np.mean(np.square(missed))), rel=1e-6)


def test_a_fit_that_leaves_a_launch_without_time_is_not_used() -> None:
    counts = steps(5)
    alone = np.array([cell.median_us for cell in CELLS])
    found, how = corrected(CELLS, counts, counts @ np.maximum(alone - 5, 0.1))
    assert how.fitted_error < how.alone_error / 2
    assert not how.used and found == CELLS


def test_a_fit_that_spoils_one_regime_is_not_used() -> None:
    cells = [*CELLS, CELLS[-1].model_copy(update={"context": 256})]
    alone = np.array([cell.median_us for cell in cells])
    counts = np.column_stack([steps(7, 80), np.zeros(80)])
    counts[:8, -2:] = (0, 1)
    measured = counts @ (1.5 * alone)
    assert corrected(cells, counts, measured)[1].used
    measured[:8] = counts[:8] @ alone
    found, how = corrected(cells, counts, measured)
    assert how.fitted_error < how.alone_error / 2
    assert not how.used and found == cells


def test_a_fit_that_explains_little_is_not_used() -> None:
    counts, noise = steps(8), np.random.default_rng(9).normal(1, 0.08, 40)
    alone = np.array([cell.median_us for cell in CELLS])
    found, how = corrected(CELLS, counts, 1.1 * counts @ alone * noise)
    assert how.fitted_error > how.alone_error / 2
    assert not how.used and found == CELLS


def test_a_kernel_that_no_step_has_keeps_its_lone_time() -> None:
    counts = steps(6)
    counts[:, 4:7] = 0
    alone = np.array([cell.median_us for cell in CELLS])
    found, how = corrected(CELLS, counts, counts @ (2 * alone))
    assert how.used and [cell.step_us for cell in found[4:7]] == [None] * 3
