"""Lagrangian relaxation for 1e5 to 1e8 units: groups, blocks or rows of weights.

The same optimum as `pareto_dp`, reached without touching most units more than
a few times:

1. A price λ splits the units: those that take the same candidate at a price
   known to be above and at one known to be below are decided (their candidate
   is optimal in between). Both prices come from the hull of a random sample
   and a margin for its error (Floyd and Rivest's selection, CACM 18, 1975).
2. The few units left give the exact price and a first choice (hull.py).
3. The units whose second best candidate has the least reduced cost r are
   solved exactly (pareto_dp.py) with all others fixed. A policy that differs
   elsewhere is above the Lagrangian bound by the least r there, at least: this
   proves the optimum, or a gap of that order.

Passes run over chunks that fit the processor's cache; memory beyond the
problem is some tens of bytes a unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers import pareto_dp
from bitsearch.solvers.budget import require_feasible, whole_costs
from bitsearch.solvers.hull import lower_hulls
from bitsearch.solvers.lagrangian import relax
from bitsearch.solvers.problem import Damage, Problem, Solution
from bitsearch.solvers.ties import merge_ties

Costs = NDArray[np.int64] | NDArray[np.int32]
Picks = NDArray[np.int16]  # candidates in a quarter of a Choice's memory

CHUNK = 1 << 15
SAMPLE = 50_000
UNDECIDED = 50_000  # few enough for an exact hull
MAX_ROUNDS = 40
CORE = 4_000


def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """A choice whose gap is usually 0 and always far below one unit's step.

    Arrays may be float32 and int32, and broadcast views where units share
    their costs: nothing of their size is copied.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    merged, member = merge_ties(problem)
    costs, budget = whole_costs(merged, "large")
    require_feasible(merged)
    damage = merged.damage
    picks = _picks(damage, costs, 0.0)
    bound = np.inf
    if _total(costs, picks) > budget:
        picks, price = _relaxed(damage, costs, budget, picks, np.random.default_rng(seed))
        picks, bound = _core_solved(damage, costs, budget, picks, price)
    choice = picks[member].astype(np.int64)
    total = problem.total_damage(choice)
    return Solution(choice, total, min(bound, total))


def _chunks(units: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, units, CHUNK))


def _total(table: Damage | Costs, picks: Picks) -> Any:
    """Σ of the chosen entries: an exact int for costs, a float for damages."""
    dtype = np.int64 if np.issubdtype(table.dtype, np.integer) else np.float64
    return sum(
        np.take_along_axis(table[rows], picks[rows, None].astype(np.int64), axis=1)
        .sum(dtype=dtype)
        .item()
        for rows in _chunks(len(picks))
    )


def _picks(damage: Damage, costs: Costs, price: float, *, dear: bool = False) -> Picks:
    """Each unit's best candidate at a price; of equals the cheapest, or the dearest."""
    picks = np.zeros(len(damage), np.int16)
    for rows in _chunks(len(damage)):
        pick = picks[rows]
        best, best_cost = np.full(len(pick), np.inf), np.zeros(len(pick), np.int64)
        for candidate, (harm, cost) in enumerate(zip(damage[rows].T, costs[rows].T, strict=True)):
            if np.isinf(price):  # the cheapest allowed
                priced = np.where(harm < np.inf, cost, np.inf)
            else:
                priced = harm + price * cost
            equal = priced == best
            better = priced < best
            better |= equal & ((cost > best_cost) if dear else (cost < best_cost))
            np.copyto(best, priced, where=better)
            np.copyto(best_cost, cost, where=better)
            pick[better] = candidate
    return picks


@dataclass(slots=True)
class _Bracket:
    """Two prices around the one sought, and the units' best choices at them.

    Attributes:
        above: a price at which `cheap` keeps the budget.
        below: a price at which `dear` exceeds it.
    """

    above: float
    below: float
    cheap: Picks
    dear: Picks

    def narrow(self, damage: Damage, costs: Costs, budget: int, price: float) -> None:
        """Replace one end by a price in between, or both if it is the one sought."""
        if not self.below < price < self.above:
            return
        cheap = _picks(damage, costs, price)
        if _total(costs, cheap) > budget:
            self.below, self.dear = price, cheap
            return
        dear = _picks(damage, costs, price, dear=True)
        self.above, self.cheap = price, cheap
        if _total(costs, dear) > budget:
            self.below, self.dear = price, dear
        else:
            self.cheap = dear


def _relaxed(
    damage: Damage, costs: Costs, budget: int, dear: Picks, rng: np.random.Generator
) -> tuple[Picks, float]:
    """The last choice on the convex front within the budget, and the price there."""
    picks = _picks(damage, costs, np.inf)
    bracket = _Bracket(np.inf, 0.0, picks.copy(), dear)
    units = np.arange(len(damage))
    for _ in range(MAX_ROUNDS):
        if len(units) <= UNDECIDED or bracket.above == bracket.below:
            break
        center, margins = _sampled_prices(damage, costs, budget, rng)
        bracket.narrow(damage, costs, budget, center)
        bracket.narrow(damage, costs, budget, margins[0 if bracket.below == center else 1])
        picks[units] = bracket.cheap
        undecided = np.flatnonzero(bracket.cheap != bracket.dear)
        units, cheap = units[undecided], bracket.cheap[undecided]
        budget -= _total(costs, bracket.cheap)
        damage, costs = damage[undecided], costs[undecided]
        budget += _total(costs, cheap)
        bracket = replace(bracket, cheap=cheap, dear=bracket.dear[undecided])
    if len(units) <= UNDECIDED:
        exact = damage.astype(np.float64), costs.astype(np.int64)
        picks[units], price = relax(*exact, budget)
        return picks, float(np.clip(price, bracket.below, bracket.above))
    # very many equal slopes: it does not matter which of these units are raised
    raised = _raised(costs, budget, bracket)
    picks[units[raised]] = bracket.dear[raised]
    return picks, bracket.above


def _sampled_prices(
    damage: Damage, costs: Costs, budget: int, rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """The price of a random sample, and prices above and below by its likely error."""
    sample = np.sort(rng.choice(len(damage), min(SAMPLE, len(damage)), replace=False))
    sampled = costs[sample].astype(np.int64)
    hulls = lower_hulls(damage[sample].astype(np.float64), sampled)
    rows = np.arange(len(sample))
    spent = sampled[rows, hulls.cheapest].sum() + np.cumsum(hulls.cost)
    share = budget * len(sample) / len(damage)
    center = hulls.upgraded(int(np.searchsorted(spent, share)))
    error = 4 * max(1.0, float(sampled[rows, center].std())) * len(sample) ** 0.5
    slopes = np.append(hulls.slope, 0.0)
    prices = slopes[np.searchsorted(spent, [share, share - error, share + error])].tolist()
    return prices[0], (prices[1], prices[2])


def _raised(costs: Costs, budget: int, bracket: _Bracket) -> NDArray[np.int64]:
    """The first units whose dearer choices fit into the budget together."""
    rows = np.arange(len(costs))
    step = costs[rows, bracket.dear].astype(np.int64) - costs[rows, bracket.cheap]
    slack = budget - _total(costs, bracket.cheap)
    return rows[: int(np.searchsorted(np.cumsum(step), slack, side="right"))]


def _core_solved(
    damage: Damage, costs: Costs, budget: int, picks: Picks, price: float
) -> tuple[Picks, float]:
    """Solve the units nearest to another candidate exactly; the choice and a bound."""
    bound = -price * budget
    margin = np.empty(len(damage))  # reduced cost of the second best candidate
    for rows in _chunks(len(damage)):
        best = np.full(len(margin[rows]), np.inf)
        second = best.copy()
        for harm, cost in zip(damage[rows].T, costs[rows].T, strict=True):
            priced = harm + price * cost
            np.minimum(second, np.maximum(best, priced), out=second)
            np.minimum(best, priced, out=best)
        bound += float(best.sum())
        margin[rows] = second - best
    core, excluded = np.arange(len(damage)), np.inf
    if len(damage) > CORE:
        nearest = np.argpartition(margin, CORE)
        core, excluded = np.sort(nearest[:CORE]), float(margin[nearest[CORE]])
    spent = int(costs[core, picks[core]].sum(dtype=np.int64))
    rest = budget - int(_total(costs, picks)) + spent
    exact = pareto_dp.solve(Problem(damage[core], costs[None, core], np.array([rest])))
    picks[core] = exact.choice
    others = _total(damage, picks) - exact.damage
    inside = others + (exact.damage if exact.bound is None else exact.bound)
    # a policy that differs outside the core costs at least `excluded` more than the bound
    return picks, min(inside, bound + excluded)
