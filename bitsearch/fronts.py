"""The exported front: its points, knee and hypervolume, and what they measure.

Points are minimal in predicted damage and one or two costs. Measured on
selection text, some of them are no better than a point that costs less: the
paired bootstrap interval of their difference in KL, over windows, contains 0.
Such a point names the cheaper one in `same_as`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.budget import Budget
from bitsearch.errors import BadInput, UsageError
from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.kernels.regime import Regime
from bitsearch.objectives.cost.latency import Latency
from bitsearch.run import Run, atomic_write, read_json
from bitsearch.session import Session
from bitsearch.solvers.front import hypervolume, knee, non_dominated
from bitsearch.solvers.pareto_dp import Front, front
from bitsearch.solvers.problem import Problem
from bitsearch.solvers.three import front_of_three
from bitsearch.space import Space

FRONT_POINTS = 400
MEASURED = ("kl", "kl_low", "kl_high", "measured_front", "measured_knee", "same_as")
_FILES = ("front.csv", "front.json")


@dataclass(frozen=True, slots=True)
class Column:
    """One cost of a front.

    Attributes:
        name: in the files.
        table: (units, candidates) of what choices change.
        kept: what no choice changes.
        unit: what one of the files' numbers stands for, in those of the table.
        parameters: whose bits a weight are told as well, or 0.
    """

    name: str
    table: NDArray[np.int64]
    kept: int
    unit: int = 1
    parameters: int = 0

    def entry(self, cost: float) -> float | int:
        """A cost as the files hold it."""
        total = int(cost) + self.kept
        return total if self.unit == 1 else total / self.unit


def save_front(
    run: Run,
    space: Space,
    budgets: Sequence[Budget],
    problem: Problem,
    curve: Front | None,
    times: Mapping[Regime, Latency],
) -> None:
    """`front.csv` and `front.json`: at most some hundred points, evenly spread.

    Of two objectives if all budgets count the same bytes, of three if they count
    two kinds, or one is a time: bytes and milliseconds then. Of more kinds, and where
    the policy may hold only few formats, no front is known: one of an earlier search
    is removed.

    Args:
        run: where the files go.
        space: of the policies.
        budgets: of the search.
        problem: of the search.
        curve: the front of the first budget's cost, if it is known already.
        times: of each regime that a budget names.
    """
    columns = _columns(space, budgets, times)
    if problem.distinct is not None or len(columns) > 2:
        for name in _FILES:
            (run.path / name).unlink(missing_ok=True)
        return
    first, *others = (column.table for column in columns)
    if others:
        choices, objectives = front_of_three(problem.damage, first, others[0], ties=problem.ties)
        spread = np.unique(np.linspace(0, len(choices) - 1, FRONT_POINTS).round().astype(int))
        choices, objectives, exact = choices[spread], objectives[spread], False
    else:
        curve = curve or front(problem.damage, first, ties=problem.ties)
        grid = np.linspace(curve.bytes[0], curve.bytes[-1], FRONT_POINTS)
        points = sorted({curve.within(value) for value in grid})
        choices = np.array([curve.choice(point) for point in points])
        objectives = np.column_stack([curve.bytes[points], curve.damage[points]])
        exact = curve.exact
    corner = _worst(problem, [column.table for column in columns])
    bend = knee(objectives[:, [0, -1]])
    rows = []
    for index, (choice, point) in enumerate(zip(choices, objectives, strict=True)):
        row: dict[str, Any] = {}
        for column, cost in zip(columns, point[:-1], strict=True):
            row[column.name] = column.entry(cost)
            if column is columns[0]:
                row["bpw"] = 8 * column.entry(cost) / column.parameters
        row |= {"damage": float(point[-1]), "knee": index == bend}
        rows.append(row | {"choice": [int(c) for c in choice]})
    _write(
        run,
        {
            "scope": "linear" if budgets[0].linear_only else "all",
            "exact": exact,
            "costs": [column.name for column in columns],
            "hypervolume": _share(objectives, corner),
            "points": rows,
        },
    )


def measure_front(
    session: Session, count: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure points of the run's front on selection text, and store what they show.

    Args:
        session: of the run.
        count: points to measure, evenly spread, both ends and the knee among them.
        progress: called with stage, done, total.

    Returns:
        The content of `front.json`, each measured point with its KL in nats a token,
        its 95 % interval, whether no measured point beats it, whether it is the knee
        of those, and `same_as`: the index of a point of no higher cost that cannot be
        told from it.

    Raises:
        BadInput: there is no front, or it is damaged or of another space.
        UsageError: `count` is below 2.
    """
    if count < 2:
        raise UsageError(f"--measure {count}: a front has two ends; measure 2 points or more")
    content = read_front(session.run.path)
    points, costs = content["points"], content["costs"]
    shape = session.space.allowed.shape
    if any(
        len(point["choice"]) != shape[0] or not set(point["choice"]) <= set(range(shape[1]))
        for point in points
    ):
        raise BadInput(f"{session.run.path / 'front.json'} is not of this run's units")
    chosen = set(np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int))
    if len(chosen) > 2:  # the knee takes the place of the nearest inner point
        bend = next(index for index, point in enumerate(points) if point["knee"])
        inner = sorted(chosen)[1:-1]
        if bend not in chosen:
            chosen.remove(min(inner, key=lambda index: abs(index - bend)))
            chosen.add(bend)
    measured = sorted(int(index) for index in chosen)
    judge = Judge(session, "selection")
    kl = []
    for done, index in enumerate(measured):
        progress("front, selection text", done, len(measured))
        kl.append(judge.quality(np.array(points[index]["choice"], np.int64)).kl)
    progress("front, selection text", len(measured), len(measured))

    windows = np.array(kl)
    prices = np.array([[points[index][name] for name in costs] for index in measured], float)
    plane = np.column_stack([prices, windows.mean(axis=1)])
    best, bend = non_dominated(plane), knee(plane[:, [0, -1]])
    same = indistinguishable(prices, windows)
    for point in points:
        point.update(dict.fromkeys(MEASURED))
    for place, index in enumerate(measured):
        low, high = interval(windows[place])
        twin = same[place]
        points[index] |= {
            "kl": float(windows[place].mean()),
            "kl_low": low,
            "kl_high": high,
            "measured_front": bool(best[place]),
            "measured_knee": place == bend,
            "same_as": None if twin is None else measured[twin],
        }
    content["corpus"] = judge.corpus.describe()
    _write(session.run, content)
    return content


def indistinguishable(costs: NDArray[np.float64], kl: NDArray[np.float64]) -> list[int | None]:
    """For each policy one of no higher cost whose KL cannot be told from its own.

    Policies are taken by rising cost. One is compared with those before it that
    cost no more in any respect and have no twin themselves; if the 95 % paired
    bootstrap interval of the mean difference contains 0, the cheapest such is its
    twin. One window tells nothing: then nobody has a twin.

    Args:
        costs: (policies, costs).
        kl: (policies, windows), all on the same windows.

    Returns:
        Index of the twin, or None.
    """
    found: list[int | None] = [None] * len(costs)
    if kl.shape[1] < 2:
        return found
    order = np.lexsort(costs.T[::-1])
    for place, index in enumerate(order):
        for other in order[:place]:
            if found[other] is not None or (costs[other] > costs[index]).any():
                continue
            low, high = interval(kl[index] - kl[other])
            if low <= 0 <= high:
                found[index] = int(other)
                break
    return found


def read_front(folder: Path) -> dict[str, Any]:
    """The content of a run's `front.json`.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    path = folder / "front.json"
    if not path.is_file():
        raise BadInput(f"{folder} holds no front; run `bitsearch search` with --out {folder} first")
    content = read_json(path)
    try:
        names = {"damage", "knee", "choice", *content["costs"]}
        if not content["points"] or any(not names <= point.keys() for point in content["points"]):
            raise BadInput(f"{path} holds no points; search again to make it anew")
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is no front; search again to make it anew") from error
    found: dict[str, Any] = content
    return found


def _columns(
    space: Space, budgets: Sequence[Budget], times: Mapping[Regime, Latency]
) -> list[Column]:
    """What the budgets count, and all bytes beside any time."""
    found: list[Column] = []
    if times or not all(budget.linear_only for budget in budgets):
        found.append(Column("bytes", space.bytes, space.kept_bytes, 1, space.layout.parameters))
    if any(budget.linear_only for budget in budgets):
        table = np.where(space.linear[:, None], space.bytes, 0)
        counted = sum(u.parameters for u, i in zip(space.units, space.linear, strict=True) if i)
        found.append(Column("linear_bytes", table, 0, 1, counted))
    for time in times.values():
        found.append(Column("ms", time.nanoseconds, time.rest, 1_000_000))
    return found


def _worst(problem: Problem, tables: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The corner that every policy lies below: each objective's worst, unit by unit."""
    allowed = np.isfinite(problem.damage)
    every = [*tables, problem.damage]
    return np.array([np.where(allowed, table, 0).max(axis=1).sum() for table in every], float)


def _share(objectives: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Share of the box from the ideal to the worst corner that the front dominates."""
    ideal = objectives.min(axis=0)
    span = np.where(corner > ideal, corner - ideal, 1.0)
    return hypervolume((objectives - ideal) / span, np.ones(objectives.shape[1]))


def _write(run: Run, content: dict[str, Any]) -> None:
    run.write_json("front.json", content)
    names = [name for name in content["points"][0] if name != "choice"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(content["points"])
    atomic_write(run.path / "front.csv", text.getvalue().encode())
