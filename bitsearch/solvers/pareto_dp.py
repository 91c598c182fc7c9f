"""Exact multiple-choice knapsack over integer bytes: one budget, or the whole front.

The dynamic programme runs over lists of non-dominated (bytes, damage) sums of
exact integers (states.py), without a grid. `front` keeps whole lists, and so
answers every budget at once.

`solve` needs far shorter lists. With the price λ of the linear relaxation, the
damage of a policy is

    LB + Σ_u r[u, c] + λ · slack,   r[u, c] = damage + λ·bytes − min_c (damage + λ·bytes) ≥ 0

where LB is the Lagrangian bound. So only policies with Σ r ≤ G can lie within
G of it. It guesses a small G and raises it until a policy is found: that one is
optimal. Meanwhile

- a state is dropped as soon as the linear relaxation of all open units
  (hull.py) shows that it ends above LB + G; reducing by relaxation follows
  Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
  EJOR 83, 1995;
- units are dealt into two halves whose lists are joined by binary search
  (Horowitz and Sahni, JACM 21, 1974): each has about the square root of the
  length that one list would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers.budget import byte_budget, require_feasible
from bitsearch.solvers.greedy import upgrade
from bitsearch.solvers.hull import Hulls, dual_bound, lower_hulls
from bitsearch.solvers.lagrangian import relax
from bitsearch.solvers.problem import Choice, Damage, Problem, Solution
from bitsearch.solvers.states import Keep, States, empty
from bitsearch.solvers.ties import merge_ties

MAX_STATES = 500_000
MAX_POINTS = 4096


def solve(problem: Problem, *, seed: int = 0, max_states: int = MAX_STATES) -> Solution:
    """The optimal choice; its bound equals its damage.

    Model-like problems need some thousand states. Only where a list outgrows
    `max_states` (damages that are linear in bytes, as in a subset-sum problem)
    is it thinned; the bound is then what was proved before, the gap not 0.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, "pareto_dp")
    require_feasible(merged)
    damage = np.asarray(merged.damage, np.float64)
    costs, budget = _reduced(damage, costs, budget)
    choice, proved = _deepen(damage, costs, budget, max_states)
    total = problem.total_damage(choice[member])
    return Solution(choice[member], total, total if proved is None else min(proved, total))


def _reduced(
    damage: NDArray[np.float64], costs: NDArray[np.int64], budget: int
) -> tuple[NDArray[np.int64], int]:
    """Costs above each unit's cheapest in their common divisor; the budget so rounds down."""
    allowed = damage < np.inf
    cheapest = np.where(allowed, costs, costs.max()).min(axis=1)
    above = np.where(allowed, costs - cheapest[:, None], 0)
    divisor = int(np.gcd.reduce(above, axis=None)) or 1
    return above // divisor, (budget - int(cheapest.sum())) // divisor


def _deepen(
    damage: NDArray[np.float64], costs: NDArray[np.int64], budget: int, max_states: int
) -> tuple[Choice, float | None]:
    """The best choice, and None if it is optimal, else a lower bound."""
    rows = np.arange(len(damage))
    start, price = relax(damage, costs, budget)
    known = upgrade(damage, costs, budget, start)
    if price == 0:  # the budget takes every unit's least damage
        return known, None
    priced = damage + price * costs
    excess = priced - priced.min(axis=1, keepdims=True)
    bound = dual_bound(damage, costs, budget, price)
    rounding = 1e-13 * float(np.abs(priced[rows, known]).sum())
    gap = float(damage[rows, known].sum()) - bound
    if gap <= rounding:
        return known, None
    guess, proved = gap / 4096, bound
    while True:
        limit = bound + guess + rounding
        candidates = np.where(excess <= guess + rounding, damage, np.inf)
        found, complete = _best_below(limit, price, candidates, costs, budget, max_states)
        if found is not None and damage[rows, found].sum() < damage[rows, known].sum():
            known = found
        if complete and (found is not None or guess >= gap):
            return known, None
        if found is not None or guess >= gap:
            return known, proved
        if complete:
            proved = bound + guess
        guess = min(4 * guess, gap)


def _best_below(
    limit: float,
    price: float,
    damage: NDArray[np.float64],
    costs: NDArray[np.int64],
    budget: int,
    max_states: int,
) -> tuple[Choice | None, bool]:
    """A choice with damage ≤ limit if one is found, and whether nothing was thinned out.

    Unless thinned, it is the best one, and none is found only if none exists.
    """
    options = (damage < np.inf).sum(axis=1)
    choice: Choice = damage.argmin(axis=1)
    fixed, free = np.flatnonzero(options == 1), np.flatnonzero(options > 1)
    budget -= int(costs[fixed, choice[fixed]].sum())
    limit -= float(damage[fixed, choice[fixed]].sum())
    if not len(free):
        return (choice if budget >= 0 and limit >= 0 else None), True
    damage, costs = damage[free], costs[free]
    hulls = lower_hulls(damage, costs)
    halves = np.arange(0, len(free), 2), np.arange(1, len(free), 2)
    lists, complete = [], True
    for half in halves:
        states = empty()
        closed = np.zeros(len(free), np.bool_)
        for unit in half:
            closed[unit] = True
            keep = _can_end_below(limit, budget, hulls, closed, damage, costs)
            states = states.grown(costs[unit], damage[unit], keep)
            if len(states) > max_states:
                complete, max_states = False, min(max_states, MAX_POINTS)
                step = -(-int(states.costs[-1] + 1) // max_states)
                states = states.only(_nearest(states, step, states.damage + price * states.costs))
        lists.append(states)
    pair = _join(lists[0], lists[1], budget, limit)
    if pair is None:
        return None, complete
    for half, states, state in zip(halves, lists, pair, strict=True):
        choice[free[half]] = states.candidates(state)
    return choice, complete


def _can_end_below(
    limit: float,
    budget: int,
    hulls: Hulls,
    closed: NDArray[np.bool_],
    damage: NDArray[np.float64],
    costs: NDArray[np.int64],
) -> Keep:
    """Whether a state of the closed units may still end within budget and limit."""
    opened = np.flatnonzero(~closed)
    edges = ~closed[hulls.unit]
    cheapest = hulls.cheapest[opened]
    spent = costs[opened, cheapest].sum() + np.cumsum(np.append(0, hulls.cost[edges]))
    left = damage[opened, cheapest].sum() - np.cumsum(np.append(0.0, hulls.gain[edges]))

    def keep(
        state_costs: NDArray[np.int64], state_damage: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        relaxed = np.interp(budget - state_costs, spent, left, left=np.inf)
        promising: NDArray[np.bool_] = state_damage + relaxed <= limit
        return promising

    return keep


def _join(one: States, other: States, budget: int, limit: float) -> tuple[int, int] | None:
    """The pair of states with the least damage within budget and limit."""
    if not (len(one) and len(other)):
        return None
    partner = np.searchsorted(other.costs, budget - one.costs, side="right") - 1
    damage = np.where(partner >= 0, one.damage + other.damage[partner], np.inf)
    best = int(damage.argmin())
    return (best, int(partner[best])) if damage[best] <= limit else None


@dataclass(frozen=True, slots=True)
class Front:
    """Policies by rising bytes, none of which beats another.

    Attributes:
        bytes: (points,) exact total bytes, rising.
        damage: (points,) total damage, falling.
        bound: (points,) certified lower bound on the damage of every policy of
            at most so many bytes; equal to `damage` where `exact`.
        exact: whether every non-dominated policy is a point.
        resolution: bytes within which only one point was kept, 1 if exact.
    """

    bytes: NDArray[np.int64]
    damage: NDArray[np.float64]
    bound: NDArray[np.float64]
    exact: bool
    resolution: int
    _states: States
    _member: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bytes)

    def choice(self, point: int) -> Choice:
        """The policy at a point, shape (units,)."""
        return np.array(self._states.candidates(point), np.int64)[self._member]

    def within(self, budget: float) -> int:
        """The point of least damage within a budget.

        Raises:
            InfeasibleBudget: the first point is already above it.
        """
        point = int(np.searchsorted(self.bytes, budget, side="right")) - 1
        if point < 0:
            raise InfeasibleBudget(
                f"budget {budget:.15g} is below the least achievable {self.bytes[0]}; "
                f"give between {self.bytes[0]} and {self.bytes[-1]}"
            )
        return point


def front(
    damage: Damage,
    costs: NDArray[np.int64],
    *,
    ties: Sequence[tuple[int, ...]] = (),
    budget: int | None = None,
    max_points: int = MAX_POINTS,
) -> Front:
    """All non-dominated policies, or one every `resolution` bytes if there are too many.

    A list longer than `max_points` is thinned: of the points in one step of
    bytes the nearest to the convex front stays. Every point is still a policy
    with its exact bytes; `bound` says how far from optimal it can be.

    Args:
        damage: (units, candidates), +inf where a candidate is not allowed.
        costs: (units, candidates) bytes.
        ties: disjoint sets of units that take the same candidate.
        budget: leave out policies of more bytes; all if None.
        max_points: the longest list to keep exact.

    Raises:
        InfeasibleBudget: even the cheapest policy exceeds the budget.
    """
    limit = int(costs.max(axis=1).sum()) if budget is None else budget
    problem = Problem(damage, costs[None], np.array([limit]), tuple(ties))
    merged, member = merge_ties(problem)
    require_feasible(merged)
    damage = np.asarray(merged.damage, np.float64)
    costs = merged.costs[0].astype(np.int64)
    cheapest = np.where(damage < np.inf, costs, costs.max()).min(axis=1)
    above = costs - cheapest[:, None]
    slack = limit - int(cheapest.sum())
    hulls = lower_hulls(damage, above)

    def keep(state_costs: NDArray[np.int64], _: NDArray[np.float64]) -> NDArray[np.bool_]:
        return state_costs <= slack

    states, resolution = empty(), 1
    for unit in range(len(damage)):
        states = states.grown(above[unit], damage[unit], keep)
        if len(states) > max_points:
            step = -(-int(states.costs[-1] + 1) // max_points)
            convex = np.interp(states.costs, *_convex_front(hulls, damage, unit))
            states = states.only(_nearest(states, step, states.damage - convex))
            resolution = max(resolution, step)
    exact = resolution == 1
    bound = states.damage
    if not exact:
        convex = np.interp(states.costs, *_convex_front(hulls, damage, len(damage) - 1))
        bound = np.minimum(bound, convex)
    return Front(
        states.costs + int(cheapest.sum()), states.damage, bound, exact, resolution, states, member
    )


def _convex_front(
    hulls: Hulls, damage: NDArray[np.float64], last: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Vertices (cost, damage) of the convex front of units 0 … last."""
    edges = hulls.unit <= last
    start = damage[np.arange(last + 1), hulls.cheapest[: last + 1]].sum()
    added = np.cumsum(np.append(0, hulls.cost[edges]))
    return added, start - np.cumsum(np.append(0.0, hulls.gain[edges]))


def _nearest(states: States, step: int, distance: NDArray[np.float64]) -> NDArray[np.int64]:
    """In each step of cost the state of least distance, and both ends."""
    distance = distance.copy()
    distance[[0, -1]] = -np.inf
    bucket = states.costs // step
    order = np.lexsort((distance, bucket))
    first = np.flatnonzero(np.diff(bucket[order], prepend=-1))
    return np.sort(order[first])
