"""Bayesian optimisation of the real loss, directly over the bits of coarse units.

Few measurements allow few dimensions: units of one kind and one third of depth
share a number, the place on their ladder. All numbers are then shifted together
as far as the budget allows, and what is left goes to the steps of the highest
predicted gain per byte, so every trial is feasible and spends the budget. The
first trial is the additive optimum, averaged over each coarse unit.

The logarithm of KL is modelled by Optuna's samplers: `gp` (Gaussian process,
Matérn 5/2 kernel, log expected improvement) and `tpe` (tree-structured Parzen
estimator, Bergstra et al., NIPS 2011, multivariate).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import Trial

from bitsearch.solvers import pareto_dp
from bitsearch.solvers.greedy import upgrade
from bitsearch.solvers.ladders import Ladders, Levels, make_ladders
from bitsearch.solvers.measured import (
    Loss,
    StudyPlace,
    Traits,
    coarse_units,
    measured_solution,
    no_traits,
)
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.study import minimise

LEAST_KL = 1e-12


def gp_sampler(seed: int) -> BaseSampler:
    """Optuna's Gaussian process."""
    return GPSampler(seed=seed)


def tpe_sampler(seed: int) -> BaseSampler:
    """Optuna's multivariate Parzen estimator."""
    return TPESampler(seed=seed, multivariate=True)


def gp(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """Gaussian-process search over the bits of coarse units.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    return _solve(problem, loss, gp_sampler, tokens, seed, traits, study)


def tpe(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """Parzen-estimator search over the bits of coarse units.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    return _solve(problem, loss, tpe_sampler, tokens, seed, traits, study)


def log_kl(_: Choice, kl: float) -> tuple[float]:
    """What the samplers minimise."""
    return (math.log(max(kl, LEAST_KL)),)


def _solve(
    problem: Problem,
    loss: Loss,
    sampler: Callable[[int], BaseSampler],
    tokens: int,
    seed: int,
    traits: Traits | None,
    study: StudyPlace | None,
) -> Solution:
    ladders = make_ladders(problem, "bayesian")
    group = coarse_units(ladders.member, traits or no_traits(len(problem.damage)))
    groups = int(group.max()) + 1

    def propose(trial: Trial) -> Choice:
        heights = np.array([trial.suggest_float(f"g{index}", 0.0, 1.0) for index in range(groups)])
        return ladders.choice(_shifted(ladders, heights[group]))

    archive = minimise(
        propose,
        loss,
        sampler=sampler,
        seed=seed,
        tokens=tokens,
        place=study,
        values=log_kl,
        first=[_exact(ladders, group)],
    )
    return measured_solution(problem, min(archive, key=lambda point: point[1])[0])


def _exact(ladders: Ladders, group: NDArray[np.int64]) -> dict[str, Any]:
    """The additive optimum as mean heights of the coarse units."""
    levels = ladders.levels(pareto_dp.solve(ladders.problem).choice)
    heights = levels / np.maximum(ladders.top, 1)
    return {f"g{index}": float(heights[group == index].mean()) for index in range(group.max() + 1)}


def _shifted(ladders: Ladders, heights: NDArray[np.float64]) -> Levels:
    """Levels at heights in [0, 1], moved up or down together until the budget is spent."""

    def levels(shift: float) -> Levels:
        found: Levels = np.rint(np.clip(heights + shift, 0, 1) * ladders.top).astype(np.int64)
        return found

    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if ladders.total(levels(middle)) <= ladders.budget:
            low = middle
        else:
            high = middle
    problem = ladders.problem
    choice = upgrade(
        np.asarray(problem.damage, np.float64),
        problem.costs[0].astype(np.int64),
        ladders.budget,
        ladders.merged_choice(levels(low)),
    )
    return ladders.levels(choice)
