"""Damage tables: measured once, resumed cell by cell, checked when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from bitsearch.errors import BadInput, SettingsMismatch
from bitsearch.formats import parse_formats
from bitsearch.run import Run
from bitsearch.space import Space, make_space
from bitsearch.tables import Cell, complete_table, load_table, measure_table, read_table
from bitsearch.units import ModelLayout

SIGNATURE = {"estimator": "kl", "calibration": {"windows": 4, "length": 64}, "seed": 0}


class Estimate:
    """Counts what it is asked for; stops with an error after some cells."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[Cell] = []
        self.stop_after = stop_after

    def __call__(self, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
        self.asked += cells
        for index, (unit, candidate) in enumerate(cells):
            if index == self.stop_after:
                raise RuntimeError("killed")
            yield unit, candidate, damage_of(unit, candidate)


def damage_of(unit: int, candidate: int) -> float:
    """A distinct number for each cell."""
    return 1 / (3 + 7 * unit + candidate)


def ignore(done: int, total: int) -> None:
    """No progress shown."""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """An open run."""
    with Run(tmp_path / "run") as opened:
        yield opened


@pytest.fixture
def frozen(layout: ModelLayout) -> Space:
    """A space with forbidden cells."""
    return make_space(layout, parse_formats("int{2,4}-g32,bf16"), {"embed": "int8-row"})


def measured(run: Run, space: Space, estimate: Any, **changes: Any) -> NDArray[np.float64]:
    """The table `t` of a run."""
    return measure_table(run, "t", space, SIGNATURE | changes, estimate, ignore)


def expected(space: Space) -> NDArray[np.float64]:
    """All cells as `damage_of` gives them."""
    cells = [
        [damage_of(u, c) for c in range(len(space.candidates))] for u in range(len(space.units))
    ]
    return np.where(space.allowed, cells, np.inf)


def test_every_allowed_cell_is_measured_once(run: Run, frozen: Space) -> None:
    estimate = Estimate()
    progress: list[tuple[int, int]] = []
    table = measure_table(
        run, "t", frozen, SIGNATURE, estimate, lambda d, t: progress.append((d, t))
    )
    assert (table == expected(frozen)).all()
    assert sorted(estimate.asked) == [(int(u), int(c)) for u, c in np.argwhere(frozen.allowed)]
    total = int(frozen.allowed.sum())
    assert progress == [(done, total) for done in range(total + 1)]
    assert complete_table(run, "t") and [p.name for p in (run.path / "tables").iterdir()] == [
        "t.safetensors"
    ]


def test_a_finished_table_is_not_measured_again(run: Run, frozen: Space) -> None:
    first = measured(run, frozen, Estimate())
    again = Estimate()
    assert (measured(run, frozen, again) == first).all() and not again.asked


@pytest.mark.parametrize("stop", [0, 1, 5, 20])
def test_resuming_measures_what_is_missing(tmp_path: Path, space: Space, stop: int) -> None:
    with Run(tmp_path / "run") as run, pytest.raises(RuntimeError):
        measured(run, space, Estimate(stop))
    assert not complete_table(run, "t")
    rest = Estimate()
    with Run(tmp_path / "run") as run:
        resumed = measured(run, space, rest)
        raw = (run.path / "tables" / "t.safetensors").read_bytes()
    assert len(rest.asked) == space.allowed.sum() - stop
    with Run(tmp_path / "straight") as straight:
        assert (measured(straight, space, Estimate()) == resumed).all()
        # safetensors orders its header by itself: the same values give the same file
        assert (straight.path / "tables" / "t.safetensors").read_bytes() == raw


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_both_values(
    run: Run, space: Space, finished: bool
) -> None:
    if finished:
        measured(run, space, Estimate())
    else:
        with pytest.raises(RuntimeError):
            measured(run, space, Estimate(3))
    estimate = Estimate()
    with pytest.raises(SettingsMismatch, match=r"calibration\.windows=4, not .*windows=8"):
        measured(run, space, estimate, calibration={"windows": 8, "length": 64})
    assert not estimate.asked
    measured(run, space, estimate)  # nothing was lost


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e309])
def test_damage_that_is_no_number_becomes_the_worst(run: Run, space: Space, value: float) -> None:
    """A destroyed model is a bad choice, not the end of the search."""

    def estimate(cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
        for unit, candidate in cells:
            yield unit, candidate, value if (unit, candidate) == (2, 0) else 1.0

    table = measured(run, space, estimate)
    assert np.isfinite(table).all() and table.argmax() == 2 * len(space.candidates)
    assert table[2, 0] > 1e300 and np.isfinite(table.sum())


def test_tables_of_other_units_or_candidates_are_refused(
    run: Run, space: Space, layouts: Callable[..., ModelLayout]
) -> None:
    measured(run, space, Estimate())
    other = make_space(space.layout, parse_formats("int{2,3,4,8}-g64,bf16"))
    with pytest.raises(SettingsMismatch, match=r"candidates\.0='int2-g32', not .*'int2-g64'"):
        load_table(run, "t", other)
    larger = make_space(layouts(3), space.candidates)
    with pytest.raises(SettingsMismatch, match="units="):
        load_table(run, "t", larger)


def test_somebody_elses_table_is_used(run: Run, space: Space) -> None:
    """Any (units × candidates) array with the header of ours."""
    damage = np.random.default_rng(0).random(space.bytes.shape).astype(np.float32)
    header = {
        "schema": "bitsearch.table/1",
        "units": [unit.name for unit in space.units],
        "candidates": [candidate.name for candidate in space.candidates],
        "signature": {},
    }
    (run.path / "tables").mkdir()
    save_file(
        {"damage": damage},
        run.path / "tables" / "mine.safetensors",
        metadata={"bitsearch": json.dumps(header)},
    )
    assert (load_table(run, "mine", space) == damage).all()


def _rewrite(path: Path, damage: NDArray[Any], metadata: dict[str, str] | None) -> None:
    save_file({"damage": damage}, path, metadata=metadata)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cell_that_is_no_number_is_named(run: Run, space: Space, value: float) -> None:
    measured(run, space, Estimate())
    path = run.path / "tables" / "t.safetensors"
    damage, header = read_table(path)
    damage = damage.copy()
    damage[1, 2] = value
    _rewrite(path, damage, {"bitsearch": json.dumps(header)})
    with pytest.raises(BadInput, match=r"blocks\.0\.qkv in int4-g32 is not a finite number"):
        load_table(run, "t", space)


def test_tables_with_bad_headers_are_refused(run: Run, space: Space) -> None:
    measured(run, space, Estimate())
    path = run.path / "tables" / "t.safetensors"
    damage, header = read_table(path)
    good = dict(header)
    cases: list[tuple[Any, str]] = [
        (good | {"schema": "bitsearch.table/2"}, "schema 'bitsearch.table/2'"),
        ([1, 2], "schema None"),
        (good | {"units": 3}, "names no units"),
        (good | {"candidates": None}, "names no candidates"),
        (good | {"signature": "x"}, "names no signature"),
        (good | {"units": good["units"][:-1]}, "has shape .* its header says"),
    ]
    for content, message in cases:
        _rewrite(path, damage, {"bitsearch": json.dumps(content)})
        with pytest.raises(BadInput, match=message):
            load_table(run, "t", space)
    for metadata in ({"bitsearch": "{"}, {"other": "x"}, None, {"bitsearch": "[" * 100_000}):
        _rewrite(path, damage, metadata)
        with pytest.raises(BadInput, match=r"t\.safetensors"):
            load_table(run, "t", space)
    save_file({"loss": damage}, path, metadata={"bitsearch": json.dumps(good)})
    with pytest.raises(BadInput, match="damage"):
        load_table(run, "t", space)


def test_a_missing_table_is_named(run: Run, space: Space) -> None:
    with pytest.raises(BadInput, match=r"t\.safetensors"):
        load_table(run, "t", space)


def test_a_foreign_journal_is_refused(run: Run, space: Space) -> None:
    """Sound lines, but not those of a table of this size."""
    for records in (["x"], [{}], [{"signature": SIGNATURE}, [99, 0, 1.0]],
                    [{"signature": SIGNATURE}, [0, 0]]):  # fmt: skip
        journal = run.journal("tables/t.journal")
        for record in records:
            journal.append(record)
        with pytest.raises(BadInput, match="holds no cells of this table; delete it"):
            measured(run, space, Estimate())
        journal.remove()


@settings(max_examples=700, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_a_clear_error_or_a_table(
    run: Run, space: Space, data: st.DataObject
) -> None:
    path = run.path / "tables" / "t.safetensors"
    if not path.exists():
        measured(run, space, Estimate())
    good = path.read_bytes()
    raw = bytearray(good)
    header = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # mostly in the header, where there is something to get wrong
        end = data.draw(st.sampled_from([7, 8 + header, len(raw) - 1]))
        at = min(data.draw(st.integers(0, end)), len(raw) - 1)
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 30))]
            raw = raw or bytearray(b" ")
    path.write_bytes(raw)
    try:
        table = load_table(run, "t", space)
    except BadInput:
        pass
    else:
        assert np.isfinite(table).all() and table.shape == space.bytes.shape
    finally:
        path.write_bytes(good)


def test_a_table_names_its_bytes_and_what_was_allowed(run: Run, frozen: Space) -> None:
    measured(run, frozen, Estimate())
    stored = load_file(run.path / "tables" / "t.safetensors")
    assert (stored["bytes"] == frozen.bytes).all()
    assert (stored["allowed"].astype(bool) == frozen.allowed).all()
