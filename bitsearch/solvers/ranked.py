"""One ranking of the units, cut where the budget says: the more sensitive, the more bytes.

Each unit climbs its own ladder, its candidates from the cheapest to the best.
Its sensitivity is the damage between the two ends. A policy is a set of cuts in
the ranking, with the number n_k of units that climb k steps or more, n_1 ≥ n_2 ≥ …,
and of all cuts within the budgets the one of least total damage is taken.

With two candidates this is a threshold: the most sensitive units that fit get
the larger one (NNCF's ratio of primary precision, the threshold of mlx-lm's
dynamic quantization). With more it is the order along which HAWQ (Dong et al.,
ICCV 2019, section 3) sets widths by hand. A unit that would gain much for few
bytes is never taken out of turn, so the exact solvers are at least as good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from bitsearch.solvers.budget import byte_budget, require_feasible
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.states import non_dominated
from bitsearch.solvers.stdout import stdout_to_stderr
from bitsearch.solvers.ties import merge_ties


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """The best cuts of the ranking; no bound, because other choices need not keep to it.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, "ranked")
    require_feasible(merged)
    damage = np.asarray(merged.damage, np.float64)
    ladders = [_ladder(*unit) for unit in zip(damage, costs, strict=True)]
    choice = _best_cuts(_steps(damage, costs, ladders), costs, budget, ladders)[member]
    return Solution(choice, problem.total_damage(choice), None)


def _ladder(damage: NDArray[np.float64], costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """A unit's candidates by rising cost and falling damage, dominated ones left out."""
    allowed = np.flatnonzero(damage < np.inf)
    return allowed[non_dominated(costs[allowed], damage[allowed])]


@dataclass(frozen=True, slots=True)
class _Steps:
    """Every step of every ladder, in the order of the ranking, then upwards.

    Attributes:
        unit: (steps,) whose step it is.
        level: (steps,) 1 for the first step of a ladder.
        gain: (steps,) damage that it takes away, > 0.
        cost: (steps,) bytes that it adds, > 0.
    """

    unit: NDArray[np.int64]
    level: NDArray[np.int64]
    gain: NDArray[np.float64]
    cost: NDArray[np.int64]


def _steps(
    damage: NDArray[np.float64], costs: NDArray[np.int64], ladders: list[NDArray[np.int64]]
) -> _Steps:
    ends = np.array([(ladder[0], ladder[-1]) for ladder in ladders]).T
    rows = np.arange(len(ladders))
    sensitivity = damage[rows, ends[0]] - damage[rows, ends[1]]
    added = costs[rows, ends[1]] - costs[rows, ends[0]]
    # Equal sensitivities are told apart by bytes: the order of the units means nothing.
    order = np.lexsort((added, -sensitivity))
    unit = np.repeat(order, [len(ladders[u]) - 1 for u in order])
    level = np.concatenate([np.arange(1, len(ladders[u])) for u in order])
    low = np.concatenate([ladders[u][:-1] for u in order])
    high = np.concatenate([ladders[u][1:] for u in order])
    return _Steps(
        unit, level, damage[unit, low] - damage[unit, high], costs[unit, high] - costs[unit, low]
    )


def _best_cuts(
    steps: _Steps, costs: NDArray[np.int64], budget: int, ladders: list[NDArray[np.int64]]
) -> Choice:
    """Maximise the gain of the steps taken, no step before the one below and those above in rank.

    But for the budget these are differences of binary variables, an integral
    polyhedron, so that HiGHS has little to branch on.
    """
    start: Choice = np.array([ladder[0] for ladder in ladders], np.int64)
    rows, count = np.arange(len(start)), len(steps.unit)
    room = min(budget - int(costs[rows, start].sum()), int(steps.cost.sum()))
    if not count or steps.cost.min() > room:
        return start
    chain = _before(steps)
    scale = float(steps.cost.max())  # HiGHS' tolerances are absolute
    while True:
        with stdout_to_stderr():
            result = milp(
                -steps.gain / steps.gain.max(),
                integrality=np.ones(count, np.int64),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(steps.cost[None] / scale, ub=room / scale),
                    LinearConstraint(chain, ub=0),
                ],
                options={"mip_rel_gap": 1e-9},
            )
        taken = np.zeros(count, np.int64) if result.x is None else result.x.round().astype(np.int64)
        excess = int((steps.cost * taken).sum()) - room
        if excess <= 0:
            height = np.bincount(steps.unit, taken, len(start)).astype(np.int64)
            return np.array([ladders[unit][height[unit]] for unit in rows], np.int64)
        room -= excess  # over the budget by less than HiGHS' tolerance: ask for so much less


def _before(steps: _Steps) -> coo_array:
    """Rows y[step] − y[earlier] of the steps that each step needs; one row of zeros if none."""
    needs = []
    last: dict[int, int] = {}
    for step, level in enumerate(steps.level.tolist()):
        if level > 1:
            needs.append((step, step - 1))
        if level in last:
            needs.append((step, last[level]))
        last[level] = step
    pairs = np.array(needs, np.int64).reshape(-1, 2)
    row = np.arange(len(pairs))
    return coo_array(
        (np.repeat([1.0, -1.0], len(pairs)), (np.tile(row, 2), pairs.T.flatten())),
        shape=(max(1, len(pairs)), len(steps.level)),
    )
