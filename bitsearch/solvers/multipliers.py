"""Search of a few multipliers of the additive damage, each point solved exactly.

    damage'[u, c] = damage[u, c]^γ · exp(θ_kind(u) + η_kind(u) t_u + ζ P2(t_u)),   t = 2·depth − 1

P2 is the second Legendre polynomial. θ, η, ζ and log γ are searched on the real
loss by the samplers of `bayesian`; the exact solver turns each point into a
policy, so every trial keeps the budget. The first trial, all zeros, is the
additive optimum itself. One θ would do nothing if there were only one kind: a
common factor changes no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler
from optuna.trial import Trial

from bitsearch.solvers import milp, pareto_dp
from bitsearch.solvers.bayesian import gp_sampler, log_kl, tpe_sampler
from bitsearch.solvers.budget import refuse
from bitsearch.solvers.measured import Loss, StudyPlace, Traits, measured_solution, no_traits
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.study import minimise

# natural logarithms: a kind up to 7 times as sensitive as predicted, γ from 1/2 to 2
REACH = 2.0
GAMMA_REACH = float(np.log(2.0))
_LARGEST = 1e30


def gp(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """Gaussian-process search of damage multipliers, decoded by the exact solver.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: the problem has pair terms.
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
    """Parzen-estimator search of damage multipliers, decoded by the exact solver.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: the problem has pair terms.
    """
    return _solve(problem, loss, tpe_sampler, tokens, seed, traits, study)


def _solve(
    problem: Problem,
    loss: Loss,
    sampler: Callable[[int], BaseSampler],
    tokens: int,
    seed: int,
    traits: Traits | None,
    study: StudyPlace | None,
) -> Solution:
    refuse(problem, "multipliers", "pairs")
    features = unit_features(traits or no_traits(len(problem.damage)))
    simple = len(problem.budgets) == 1 and problem.distinct is None
    decode = pareto_dp.solve if simple else milp.solve

    def propose(trial: Trial) -> Choice:
        theta = [
            trial.suggest_float(f"m{index}", -REACH, REACH) for index in range(features.shape[1])
        ]
        gamma = float(np.exp(trial.suggest_float("gamma", -GAMMA_REACH, GAMMA_REACH)))
        return decode(scaled(problem, features @ np.array(theta), gamma)).choice

    zeros = {f"m{index}": 0.0 for index in range(features.shape[1])} | {"gamma": 0.0}
    archive = minimise(
        propose,
        loss,
        sampler=sampler,
        seed=seed,
        tokens=tokens,
        place=study,
        values=log_kl,
        first=[zeros],
    )
    return measured_solution(problem, min(archive, key=lambda point: point[1])[0])


def unit_features(traits: Traits) -> NDArray[np.float64]:
    """(units, numbers) that the logarithm of a multiplier is linear in."""
    kinds = traits.kind[:, None] == np.unique(traits.kind)
    t = (2 * traits.depth - 1)[:, None]
    # a kind that is found at one depth only has no slope over depth
    spread = np.array([np.ptp(t[column]) > 0 for column in kinds.T])
    columns = [kinds * 1.0, (kinds * t)[:, spread], (3 * t**2 - 1) / 2]
    return np.concatenate(columns, axis=1)


def scaled(problem: Problem, log_multiplier: NDArray[np.float64], gamma: float) -> Problem:
    """The problem with damage^gamma · exp(log_multiplier) of each unit; γ = 1 and 0 keep it."""
    damage = np.asarray(problem.damage, np.float64)
    powered = np.clip(damage, 0, _LARGEST) ** gamma * np.exp(log_multiplier)[:, None]
    return replace(problem, damage=np.where(np.isfinite(damage), powered, np.inf))
