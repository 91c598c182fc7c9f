"""Level-switch evolution on the real loss, seeded by the exact front.

EvoPress (Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via
Evolutionary Search", ICML 2025, algorithm 1): one parent; offspring move a few
units up and down their ladders; they are compared in rounds, many on few tokens
first, few on many last, on text drawn anew each generation; in the last round
the parent competes. Three things differ:

- the parent is not the uniform policy but the best of the additive model's
  optimum, its neighbours on the front, and the optima without the lowest rungs
  (the additive model fails there first);
- units need not be of equal size: after each move the others give or take rungs
  until the budget is kept, and spent;
- the last round takes all calibration text, so the parent's loss is known, costs
  nothing, and never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers import pareto_dp
from bitsearch.solvers.ladders import Ladders, Levels, make_ladders, repaired
from bitsearch.solvers.measured import Loss, StudyPlace, Traits, measured_solution
from bitsearch.solvers.problem import Problem, Solution

# Offspring of a round, and the share of the text that they are measured on.
ROUNDS = ((16, 1 / 16), (4, 1 / 4), (1, 1.0))
MOST_MOVES = 3
# A small problem runs out of new policies before it runs out of tokens.
MOST_IDLE = 8
Start = Callable[[Ladders, np.random.Generator], list[Levels]]


def solve(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
    start: Start | None = None,
) -> Solution:
    """Evolve the exact optimum by measured level switches within the budget.

    Args:
        problem: one byte budget.
        loss: measures policies.
        tokens: stop after the generation in which so many are spent.
        seed: of moves and of the text drawn in each generation.
        traits: not used.
        study: not used: measured losses are all the state there is.
        start: the first parents; `from_exact` unless given.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    ladders = make_ladders(problem, "evolution")
    first = (start or from_exact)(ladders, np.random.default_rng([seed, 0]))
    parent, parent_kl = _selected(ladders, first, None, loss, seed, 0)
    generation = idle = 0
    while loss.spent < tokens and idle < MOST_IDLE:
        generation, before = generation + 1, loss.spent
        rng = np.random.default_rng([seed, generation, 0])
        if offspring := list(_offspring(ladders, parent, rng)):
            best, kl = _selected(ladders, offspring, parent, loss, seed, generation)
            if kl < parent_kl:
                parent, parent_kl = best, kl
        idle = idle + 1 if loss.spent == before else 0
    return measured_solution(problem, ladders.choice(parent))


def from_exact(ladders: Ladders, rng: np.random.Generator) -> list[Levels]:
    """The additive optimum, its neighbours, and the optima above lowest rungs."""
    problem = ladders.problem
    found = [pareto_dp.solve(problem).choice]
    damage = np.asarray(problem.damage, np.float64)
    front = pareto_dp.front(damage, problem.costs[0], budget=ladders.budget, max_points=512)
    for below in (0.998, 0.996, 0.994):
        if (limit := int(below * front.bytes[-1])) >= front.bytes[0]:
            found.append(front.choice(front.within(limit)))
    for lowest in range(1, int(ladders.top.max()) + 1):
        narrowed = damage.copy()
        for unit, rungs in enumerate(ladders.rungs):
            narrowed[unit, rungs[: min(lowest, len(rungs) - 1)]] = np.inf
        try:
            found.append(pareto_dp.solve(replace(problem, damage=narrowed)).choice)
        except InfeasibleBudget:
            break
    return [ladders.levels(choice) for choice in found]


def from_uniform(ladders: Ladders, rng: np.random.Generator) -> list[Levels]:
    """The highest rung that all units can take at once, the rest of the budget spent at random."""
    level = 0
    while level < ladders.top.max() and (
        ladders.total(np.minimum(level + 1, ladders.top)) <= ladders.budget
    ):
        level += 1
    return [repaired(ladders, np.minimum(level, ladders.top), rng)]


def _offspring(ladders: Ladders, parent: Levels, rng: np.random.Generator) -> Iterator[Levels]:
    """Different mutants of the parent."""
    seen = {parent.tobytes()}
    for _ in range(4 * ROUNDS[0][0]):
        mutant = _mutated(ladders, parent, rng)
        if mutant.tobytes() not in seen:
            seen.add(mutant.tobytes())
            yield mutant
        if len(seen) > ROUNDS[0][0]:
            return


def _mutated(ladders: Ladders, parent: Levels, rng: np.random.Generator) -> Levels:
    """Move a few units by a rung or two, mostly one unit, and let others pay or gain."""
    levels, moved = parent.copy(), set()
    for _ in range(int(rng.integers(1, MOST_MOVES + 1, size=2).min())):
        unit = int(rng.integers(len(levels)))
        by = int(rng.choice([-2, -1, 1, 2]))
        levels[unit] = np.clip(levels[unit] + by, 0, len(ladders.rungs[unit]) - 1)
        moved.add(unit)
    return repaired(ladders, levels, rng, moved)


def _selected(
    ladders: Ladders,
    levels: list[Levels],
    base: Levels | None,
    loss: Loss,
    seed: int,
    generation: int,
) -> tuple[Levels, float]:
    """The best of some policies after all rounds, and its loss on all text."""
    text = np.random.default_rng([seed, generation, 1]).permutation(loss.pieces)
    resembled = None if base is None else ladders.choice(base)
    kl = np.zeros(len(levels))
    for survivors, share in ROUNDS:
        kept = np.argsort(kl, kind="stable")[:survivors]
        levels = [levels[index] for index in kept]
        pieces = text[: max(1, round(share * loss.pieces))].tolist()
        kl = loss([ladders.choice(one) for one in levels], pieces, resembled).mean(axis=1)
    return levels[0], float(kl[0])
