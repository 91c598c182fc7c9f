"""Policies of the same bytes that know nothing, or the wrong thing.

A searched policy has to beat these at its own budget: evenly spread widths,
random mixes, "first and last layers get more", and the search's own ranking
turned round. Each takes a problem with one byte budget and returns a choice
of shape (units,) that never exceeds it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers import pareto_dp
from bitsearch.solvers.budget import byte_budget, require_feasible
from bitsearch.solvers.problem import Choice, Problem, Solver
from bitsearch.solvers.ties import merge_ties

# the fractional parts of its multiples fill (0, 1) the most evenly (three-distance theorem)
_GOLDEN = (5**0.5 - 1) / 2


def random_feasible(problem: Problem, rng: np.random.Generator) -> Choice:
    """A random mix that fills the budget.

    Every unit draws an allowed candidate; then random units step down to their
    next cheaper candidate until the budget holds, and random units step up as
    long as any step fits.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, "random")
    require_feasible(merged)
    by_cost = [
        sorted(np.flatnonzero(merged.damage[unit] < np.inf), key=costs[unit].__getitem__)
        for unit in range(len(costs))
    ]
    level = np.array([rng.integers(len(ladder)) for ladder in by_cost])

    def cost(unit: int, step: int) -> int:
        return int(costs[unit, by_cost[unit][step]])

    total = sum(cost(unit, step) for unit, step in enumerate(level))
    while total > budget:
        unit = int(rng.choice(np.flatnonzero(level > 0)))
        total += cost(unit, level[unit] - 1) - cost(unit, level[unit])
        level[unit] -= 1
    rising = [unit for unit, ladder in enumerate(by_cost) if level[unit] + 1 < len(ladder)]
    while rising:
        unit = rising.pop(int(rng.integers(len(rising))))
        added = cost(unit, level[unit] + 1) - cost(unit, level[unit])
        if total + added > budget:
            continue  # the slack only shrinks: this unit stays where it is
        total += added
        level[unit] += 1
        if level[unit] + 1 < len(by_cost[unit]):
            rising.append(unit)
    return np.array([by_cost[unit][step] for unit, step in enumerate(level)], np.int64)[member]


def spread(problem: Problem, low: int, high: int) -> Choice:
    """Candidate `low` everywhere, and `high` on units evenly spread over depth.

    Units are raised in the order of the fractional parts of their index times
    the golden ratio: however many fit, they are spread as evenly as possible
    and no role in the block (every seventh unit, say) is preferred. With `low`
    equal to `high` this is the uniform policy.

    Raises:
        InfeasibleBudget: `low` everywhere exceeds the budget.
    """
    order = np.argsort(np.arange(len(problem.damage)) * _GOLDEN % 1.0)
    return raised(problem, low, high, order)


def first_last(problem: Problem, blocks: NDArray[np.int64], low: int, high: int) -> Choice:
    """Candidate `low` everywhere, and `high` on the first and last blocks.

    Args:
        problem: one byte budget.
        blocks: (units,) index of each unit's block. The nearer to either end,
            the sooner a unit is raised; the embedding counts as before the
            first block and the head as after the last.
        low: candidate of the units in the middle.
        high: candidate of the raised units.

    Raises:
        InfeasibleBudget: `low` everywhere exceeds the budget.
    """
    depth = np.asarray(blocks)
    distance = np.minimum(depth - depth.min(), depth.max() - depth)
    return raised(problem, low, high, np.argsort(distance, kind="stable"))


def raised(problem: Problem, low: int, high: int, order: NDArray[np.int64]) -> Choice:
    """Candidate `low` everywhere, then `high` unit by unit while the budget allows.

    A unit that does not fit is passed over, later ones may be smaller. Where a
    unit does not allow `low`, it takes its cheapest allowed candidate of no
    fewer bytes, or else its largest; where it does not allow `high`, it stays.

    Args:
        problem: one byte budget.
        low: candidate that all units start from.
        high: candidate that they are raised to.
        order: (units,) unit indices, first to be raised first. Tied units are
            raised together, when the first of them comes.

    Raises:
        InfeasibleBudget: `low` everywhere exceeds the budget.
    """
    merged, member = merge_ties(problem)
    costs, budget = byte_budget(merged, "control")
    require_feasible(merged)
    rows = np.arange(len(costs))
    allowed = merged.damage < np.inf
    above = np.where(allowed & (costs >= costs[:, [low]]), costs, costs.max() + 1)
    largest = np.where(allowed, costs, -1).argmax(axis=1)
    substitute = np.where((above <= costs.max()).any(axis=1), above.argmin(axis=1), largest)
    choice = np.where(allowed[:, low], low, substitute)
    total = int(costs[rows, choice].sum())
    if total > budget:
        raise InfeasibleBudget(
            f"budget {budget} is below the {total} bytes of candidate {low} everywhere; "
            "start from a cheaper candidate"
        )
    for unit in dict.fromkeys(member[order].tolist()):
        added = int(costs[unit, high] - costs[unit, choice[unit]])
        if allowed[unit, high] and 0 < added <= budget - total:
            choice[unit] = high
            total += added
    return choice[member].astype(np.int64)


def reversed_ranking(problem: Problem, solver: Solver = pareto_dp.solve) -> Choice:
    """The search's answer to the opposite sensitivities.

    A unit's sensitivity is the damage that its cheapest candidate adds per
    byte it saves. Units exchange sensitivities end for end (the most sensitive
    gets that of the least), keep their own shape of damage over candidates,
    and the problem is solved again.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
    """
    merged, member = merge_ties(problem)
    costs, _ = byte_budget(merged, "reversed")
    rows = np.arange(len(costs))
    allowed = merged.damage < np.inf
    cheapest = np.where(allowed, costs, costs.max() + 1).argmin(axis=1)
    best = merged.damage.argmin(axis=1)
    harm = merged.damage[rows, cheapest] - merged.damage[rows, best]
    saved = costs[rows, best] - costs[rows, cheapest]
    sensitivity = harm / np.maximum(saved, 1)
    ranked = np.flatnonzero(sensitivity > 0)  # units without a decision have no rank
    ranked = ranked[np.argsort(sensitivity[ranked], kind="stable")]
    scale = np.ones(len(costs))
    scale[ranked] = sensitivity[ranked[::-1]] / sensitivity[ranked]
    opposite = replace(merged, damage=np.where(allowed, merged.damage, 0) * scale[:, None])
    opposite.damage[~allowed] = np.inf
    return solver(opposite).choice[member]
