"""A front of (KL, bytes) measured where it has gaps, with a surrogate of the real loss.

As in AMQ (Lee et al., EMNLP 2025; arXiv 2509.12019) an archive of measured policies
grows: a surrogate learns from it, proposes, and what fills the front is measured.
Here the surrogate only corrects the additive model,

    log KL ≈ log Σ damage + RBF(heights of the coarse units, bytes),

and proposals are not evolved: they are exact optima, at budgets inside the widest
gap of the measured front, of damages with random multipliers (multipliers.py), so
none exceeds the budget or wastes bytes. The one predicted best is measured.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from bitsearch.solvers import pareto_dp
from bitsearch.solvers.front import non_dominated
from bitsearch.solvers.ladders import Ladders, make_ladders
from bitsearch.solvers.measured import (
    Loss,
    StudyPlace,
    Traits,
    coarse_units,
    everywhere,
    measured_solution,
    no_traits,
)
from bitsearch.solvers.problem import Choice, Problem, Solution

FIRST = 5
PROPOSALS = 12
SPREAD = 0.7  # standard deviation of a log-multiplier
LEAST_KL = 1e-12


def solve(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """The least measured KL of a front whose gaps a surrogate fills.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    found = front(problem, loss, tokens=tokens, seed=seed, traits=traits)
    return measured_solution(problem, min(found, key=lambda point: point[1])[0])


def front(
    problem: Problem, loss: Loss, *, tokens: int, seed: int = 0, traits: Traits | None = None
) -> list[tuple[Choice, float]]:
    """Policies with their measured KL, none of which beats another, by rising bytes.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    ladders = make_ladders(problem, "surrogate")
    merged = ladders.problem
    group = coarse_units(ladders.member, traits or no_traits(len(problem.damage)))
    exact = pareto_dp.front(merged.damage, merged.costs[0], budget=ladders.budget, max_points=512)
    archive: dict[bytes, tuple[Choice, float]] = {}

    def measure(choice: Choice) -> None:
        archive[choice.tobytes()] = choice, everywhere(loss, choice[ladders.member])

    for limit in np.linspace(exact.bytes[-1], exact.bytes[0], FIRST):
        choice = exact.choice(exact.within(float(limit)))
        if choice.tobytes() not in archive:
            measure(choice)
    closed: set[tuple[int, int]] = set()
    step = 0
    while loss.spent < tokens:
        measured = list(archive.values())
        gap = _widest_gap(merged, measured, closed)
        if gap is None:
            break
        rng = np.random.default_rng([seed, step])
        step += 1
        proposals = {
            choice.tobytes(): choice
            for choice in (_inside(ladders, group, gap, rng) for _ in range(PROPOSALS))
            if choice.tobytes() not in archive and gap[0] < _size(merged, choice) < gap[1]
        }
        if not proposals:
            closed.add(gap)
            continue
        fresh = list(proposals.values())
        measure(fresh[int(_predicted(ladders, group, measured, fresh).argmin())])
    measured = list(archive.values())
    kept = np.flatnonzero(non_dominated(_points(merged, measured)))
    ordered = sorted((measured[index] for index in kept), key=lambda one: _size(merged, one[0]))
    return [(choice[ladders.member], kl) for choice, kl in ordered]


def _size(problem: Problem, choice: Choice) -> int:
    return int(problem.total_costs(choice)[0])


def _points(problem: Problem, measured: list[tuple[Choice, float]]) -> NDArray[np.float64]:
    """(policies, 2) bytes and KL."""
    return np.array([(_size(problem, choice), kl) for choice, kl in measured], np.float64)


def _widest_gap(
    problem: Problem, measured: list[tuple[Choice, float]], closed: set[tuple[int, int]]
) -> tuple[int, int] | None:
    """Bytes at both ends of the widest step of the measured front, in bytes and in log KL."""
    points = _points(problem, measured)
    points = points[non_dominated(points)]
    points = points[points[:, 0].argsort(kind="stable")]
    points[:, 1] = np.log(np.maximum(points[:, 1], LEAST_KL))
    steps = np.abs(np.diff(points, axis=0))
    widths = (steps / np.maximum(np.ptp(points, axis=0), 1e-300)).sum(axis=1)
    for index in np.argsort(-widths, kind="stable").tolist():
        gap = int(points[index, 0]), int(points[index + 1, 0])
        if gap not in closed and gap[1] - gap[0] > 1:
            return gap
    return None


def _inside(
    ladders: Ladders, group: NDArray[np.int64], gap: tuple[int, int], rng: np.random.Generator
) -> Choice:
    """An exact optimum within a gap, of damages with random multipliers of coarse units."""
    budget = int(rng.integers(gap[0] + 1, gap[1]))
    factors = np.exp(rng.normal(0, SPREAD, int(group.max()) + 1))[group]
    damage = np.asarray(ladders.problem.damage, np.float64) * factors[:, None]
    return pareto_dp.solve(
        replace(ladders.problem, damage=damage, budgets=np.array([budget]))
    ).choice


def _predicted(
    ladders: Ladders,
    group: NDArray[np.int64],
    measured: list[tuple[Choice, float]],
    fresh: list[Choice],
) -> NDArray[np.float64]:
    """(fresh,) predicted log KL."""

    def features(choice: Choice) -> NDArray[np.float64]:
        heights = ladders.levels(choice) / np.maximum(ladders.top, 1)
        means = [heights[group == index].mean() for index in range(int(group.max()) + 1)]
        return np.array([*means, _size(ladders.problem, choice) / ladders.budget])

    def additive(choice: Choice) -> float:
        return float(np.log(max(ladders.problem.total_damage(choice), LEAST_KL)))

    seen = np.array([features(choice) for choice, _ in measured])
    missing = [np.log(max(kl, LEAST_KL)) - additive(choice) for choice, kl in measured]
    # smoothed, so that policies that are alike in the coarse units do no harm
    surrogate = RBFInterpolator(seen, np.array(missing), kernel="linear", degree=0, smoothing=1e-3)
    found: NDArray[np.float64] = surrogate(np.array([features(choice) for choice in fresh]))
    found += np.array([additive(choice) for choice in fresh])
    return found
