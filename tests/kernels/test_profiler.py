"""The profiler: medians of what was seen, and no table from a busy machine."""

from __future__ import annotations

from itertools import chain, cycle, repeat

import pytest

from bitsearch.errors import BadInput
from bitsearch.kernels.devices import Launch
from bitsearch.kernels.profile_file import Cell, Sentinel
from bitsearch.kernels.profiler import EVERY, time_launches
from bitsearch.testing_devices import Clockwork

LAUNCHES = [Launch(m, 256, ((n, "int4-g32"),)) for m in (1, 4) for n in (64, 128)]


def timed(device: Clockwork, launches: list[Launch]) -> tuple[list[Cell], Sentinel]:
    """Cells of launches in three rounds."""
    return time_launches(
        device,
        launches,
        rotation=1 << 20,
        rounds=3,
        seed=0,
        fixed_us=1.0,
        progress=lambda *_: None,
    )


def test_cells_hold_what_was_timed_in_the_order_asked(clockwork: Clockwork) -> None:
    cells, sentinel = timed(clockwork, LAUNCHES)
    assert [cell.launch for cell in cells] == LAUNCHES
    for cell in cells:
        assert cell.median_us == pytest.approx(clockwork.nanoseconds(cell.launch) / 1e3)
        assert cell.status == "ok" and cell.n >= 9
        assert cell.fixed == pytest.approx(1.0 / cell.median_us)
    assert sentinel.drift == 0 and sentinel.times == 4


def test_without_a_kernel_a_cell_says_why(clockwork: Clockwork) -> None:
    strange = Launch(1, 256, ((64, "int3-g32"),))
    cells, _ = timed(clockwork, [strange, *LAUNCHES])
    assert cells[0].status == "unsupported" and "no kernel for int3-g32" in (cells[0].why or "")
    with pytest.raises(BadInput, match="no kernel for any"):
        timed(clockwork, [strange])


def test_scattered_times_are_marked_unstable(clockwork: Clockwork) -> None:
    # medians of a few samples move little; single samples lie 30 % apart
    clockwork.noise = cycle((0.85, 1.0, 1.15))
    cells, sentinel = timed(clockwork, LAUNCHES)
    assert {cell.status for cell in cells} == {"unstable"}
    exact = [clockwork.nanoseconds(launch) / 1e3 for launch in LAUNCHES]
    assert [cell.median_us for cell in cells] == pytest.approx(exact, rel=0.02)
    assert sentinel.drift < 0.2


def test_a_drifting_machine_gives_no_table(clockwork: Clockwork) -> None:
    # in the second round, of 65 samples a cell
    clockwork.noise = chain(repeat(1.0, 65 * 60), repeat(1.5))
    many = [Launch(1, 256, ((64 + n, "int4-g32"),)) for n in range(2 * EVERY)]
    with pytest.raises(BadInput, match=r"too busy to be profiled: .* drifted by \d+ %"):
        timed(clockwork, many)


def test_a_burst_at_one_sentinel_is_no_drift(clockwork: Clockwork) -> None:
    many = [Launch(1, 256, ((64 + n, "int4-g32"),)) for n in range(2 * EVERY)]
    # 65 samples of the first sentinel and of each cell before the second
    quiet = 65 * (1 + EVERY)
    clockwork.noise = chain(repeat(1.0, quiet), repeat(3.0, 65), repeat(1.0))
    cells, sentinel = timed(clockwork, many)
    assert sentinel.drift == 0
    exact = [clockwork.nanoseconds(launch) / 1e3 for launch in many]
    assert [cell.median_us for cell in cells] == pytest.approx(exact)


def test_the_sentinel_comes_back_throughout(clockwork: Clockwork) -> None:
    many = [Launch(1, 256, ((64 + n, "int4-g32"),)) for n in range(2 * EVERY + 1)]
    _, sentinel = timed(clockwork, many)
    assert sentinel.times == 3 * 3 + 1
    # the longest, whose time says most of the machine
    assert sentinel.median_us == clockwork.nanoseconds(many[-1]) / 1e3
