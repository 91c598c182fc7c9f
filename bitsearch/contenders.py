"""The policies that are measured before one is shipped: searched ones and controls.

At every budget the solver's optimum stands beside its neighbours on the front,
the optima without the lowest widths (the additive model breaks down there
first), and controls of the same bytes that know nothing of sensitivity.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers import controls
from bitsearch.solvers.pareto_dp import Front
from bitsearch.solvers.problem import Choice, Problem, Solver
from bitsearch.space import Space

NEIGHBOURS = 3
_EMBEDDING_BITS = 8


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy to be measured.

    Attributes:
        name: what it is.
        choice: (units,) candidate indices.
        is_control: whether it ignores the damage table, or turns it round.
    """

    name: str
    choice: Choice
    is_control: bool


def searched(
    problem: Problem, best: Choice, front: Front | None, space: Space, solver: Solver, seed: int
) -> list[Contender]:
    """The optimum, its neighbours on the front, and optima above a lowest width."""
    found = [Contender("searched", best, False)]
    if front is not None:
        at = front.within(int(problem.budgets[0]))
        # Steps of a fifth of a per cent: nearer points differ in a unit or two.
        for step in range(1, NEIGHBOURS + 1):
            below = int(front.bytes[at] * (1 - 0.002 * step))
            if below >= front.bytes[0]:
                found.append(Contender(f"front-{step}", front.choice(front.within(below)), False))
    widths = sorted({candidate.bits for candidate in space.candidates})
    for floor in widths[1:-1]:
        keep = np.array([candidate.bits >= floor for candidate in space.candidates])
        allowed = np.isfinite(problem.damage)
        narrowed = np.where(
            keep | ~(allowed & keep).any(axis=1, keepdims=True), problem.damage, np.inf
        )
        try:
            solution = solver(replace(problem, damage=narrowed), seed=seed)
        except InfeasibleBudget:
            break
        found.append(Contender(f"at-least-{floor}-bits", solution.choice, False))
    return distinct(found)


def byte_matched(problem: Problem, space: Space, seed: int) -> list[Contender]:
    """Controls for one byte budget: uniform, filled, first/last, random, reversed.

    `uniform-F` holds every unit in the widest format F of its family (kind,
    group size, symmetry) that fits. `filled-…` spends the rest of the budget on
    the next width, spread evenly over depth. `embedN-filled-…` does so with the
    embedding and the head held at N bits: the width of `uniform-F`, the next, and
    8, as GGUF files usually have them. A limit on
    distinct formats is not theirs to keep: drop those that exceed it.
    """
    problem = additive(problem)
    found: list[Contender] = []
    outside = [i for i, unit in enumerate(space.units) if unit.kind in ("embedding", "head")]
    for family, columns in _families(space).items():
        step = _widest(problem, columns)
        if step is None:
            continue
        low, high = step
        name = space.candidates[low].name
        found += [
            Contender(f"uniform-{name}", controls.spread(problem, low, low), True),
            Contender(f"filled-{family}", controls.spread(problem, low, high), True),
            Contender(
                f"first-last-{family}",
                controls.first_last(problem, _depth(space), low, high),
                True,
            ),
        ]
        eight = [c for c in columns if space.candidates[c].bits == _EMBEDDING_BITS]
        for column in dict.fromkeys([low, high, *eight]) if outside else []:
            fixed = _fixed(problem, outside, column)
            if (step := _widest(fixed, columns)) is not None:
                bits = space.candidates[column].bits
                choice = controls.spread(fixed, *step)
                found.append(Contender(f"embed{bits}-filled-{family}", choice, True))
    rng = np.random.default_rng([seed, 1])
    found.append(Contender("random", controls.random_feasible(problem, rng), True))
    found.append(Contender("reversed", controls.reversed_ranking(problem), True))
    return distinct(found)


def uniforms(problem: Problem, space: Space) -> list[Contender]:
    """Every candidate everywhere, whatever it costs; where it is not allowed, the next larger
    one in bytes, or else the largest.

    Ties are kept where the tied units allow the same candidates.
    """
    allowed = np.isfinite(problem.damage)
    rows = np.arange(len(allowed))
    found = []
    for column, format in enumerate(space.candidates):
        if not allowed[:, column].any():
            continue
        larger = np.where(allowed & (space.bytes >= space.bytes[:, [column]]), space.bytes, 2**62)
        largest = np.where(allowed, space.bytes, -1).argmax(axis=1)
        nearest = np.where(larger.min(axis=1) < 2**62, larger.argmin(axis=1), largest)
        choice = np.where(allowed[rows, column], column, nearest).astype(np.int64)
        found.append(Contender(f"uniform-{format.name}", choice, True))
    return distinct(found)


def _widest(problem: Problem, columns: list[int]) -> tuple[int, int] | None:
    """The widest column that fits everywhere, and the next; None if not even the first does."""
    for low, high in reversed(list(zip(columns, [*columns[1:], columns[-1]], strict=True))):
        with suppress(InfeasibleBudget):
            controls.spread(problem, low, low)
            return low, high
    return None


def _fixed(problem: Problem, units: list[int], candidate: int) -> Problem:
    """The problem with units held at a candidate; frozen ones stay as they are."""
    damage = problem.damage.copy()
    others = [c for c in range(damage.shape[1]) if c != candidate]
    frozen = ~np.isfinite(damage[units, candidate])
    damage[np.ix_(units, others)] = np.where(frozen[:, None], damage[np.ix_(units, others)], np.inf)
    return replace(problem, damage=damage)


def random_policies(problem: Problem, count: int, seed: int) -> list[Contender]:
    """Random feasible mixes at the budget, for rank correlation."""
    problem = additive(problem)
    return [
        Contender(
            f"random-{index}",
            controls.random_feasible(problem, np.random.default_rng([seed, 2, index])),
            True,
        )
        for index in range(count)
    ]


def additive(problem: Problem) -> Problem:
    """The part of a problem that every solver takes: no pair terms, any number of formats."""
    return replace(problem, distinct=None, pairs=None)


def _families(space: Space) -> dict[str, list[int]]:
    """Columns of formats that differ in width alone, narrowest first."""
    families: dict[str, list[int]] = {}
    for column, format in enumerate(space.candidates):
        if not format.exact:
            families.setdefault(format.family, []).append(column)
    return {
        name: sorted(columns, key=lambda c: space.candidates[c].bits)
        for name, columns in families.items()
    }


def _depth(space: Space) -> NDArray[np.int64]:
    """Block index of each unit; embedding before the first, head after the last."""
    last = max((u.block for u in space.units if u.block is not None), default=0)
    outside = {"embedding": -1, "head": last + 1}
    return np.array([u.block if u.block is not None else outside[u.kind] for u in space.units])


def distinct(contenders: Sequence[Contender]) -> list[Contender]:
    """The first of each choice."""
    seen: dict[bytes, Contender] = {}
    for contender in contenders:
        seen.setdefault(contender.choice.tobytes(), contender)
    return list(seen.values())
