"""How far a result can be trusted: spread, ceiling, additivity, rank correlation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.contenders import random_policies
from bitsearch.judge import Judge
from bitsearch.run import read_json
from bitsearch.session import Progress, Session
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.space import Space


def diagnose(
    session: Session,
    judge: Judge,
    space: Space,
    problem: Problem,
    solution: Solution,
    estimator: str,
    draws: int,
    progress: Progress,
) -> dict[str, Any]:
    """σ and its ceiling, the gap, additivity R, and rank correlation over random policies.

    Args:
        judge: measures policies.
        draws: random policies, and single units, to measure; 0 leaves R and ρ out.
    """
    bits = 8 * space.total_bytes(solution.choice) / space.layout.parameters
    damage = np.asarray(problem.damage, np.float64)
    sigma, ceiling = sensitivity_spread(damage, space, bits)
    found: dict[str, Any] = {"sigma": _number(sigma), "ceiling": _number(ceiling)}
    found["gap"] = solution.gap
    if session.settings.proxy_quantizer is not None:
        found["proxy"] = read_json(session.run.path / f"tables/{estimator}.proxy.json")
    if not draws:
        return found
    progress("additivity", 0, 1)
    ratio, units = additivity(
        damage,
        solution.choice,
        judge.quality(solution.choice).mean_kl,
        lambda unit: judge.alone(solution.choice, unit),
        draws,
        session.settings.seed,
    )
    progress("additivity", 1, 1)
    found |= {"additivity": _number(ratio), "additivity_units": units}
    if len(problem.costs) == 1:
        policies = random_policies(problem, draws, session.settings.seed)
        measured = judge.qualities(policies, "random policies", progress)
        predicted = [problem.total_damage(policy.choice) for policy in policies]
        rho = rank_correlation(predicted, [quality.mean_kl for quality in measured])
        found |= {"rank_correlation": _number(rho), "random_policies": len(policies)}
    return found


def sensitivity_spread(
    damage: NDArray[np.float64], space: Space, bits: float
) -> tuple[float, float]:
    """σ of log sensitivities, and the ceiling of gain that it implies.

    A unit's sensitivity is its damage a parameter in the candidate nearest to
    `bits`. With loss Σ n_u s_u 4^(−b_u) and continuous widths, the best mix has
    GM/AM of the parameter-weighted sensitivities times the uniform loss.

    Returns:
        (σ in natural logs, best loss over uniform loss), nan where nothing is left.
    """
    widths = np.array([candidate.bits for candidate in space.candidates], np.float64)
    column = int(np.abs(widths - bits).argmin())
    parameters = np.array([unit.parameters for unit in space.units], np.float64)
    usable = np.isfinite(damage[:, column]) & (damage[:, column] > 0)
    if not usable.any():
        return float("nan"), float("nan")
    share = parameters[usable] / parameters[usable].sum()
    sensitivity = damage[usable, column] / parameters[usable]
    logs = np.log(sensitivity)
    mean = float((share * logs).sum())
    sigma = float(np.sqrt((share * (logs - mean) ** 2).sum()))
    arithmetic = float((share * sensitivity).sum())
    return sigma, float(np.exp(mean)) / arithmetic


def additivity(
    damage: NDArray[np.float64],
    choice: Choice,
    measured_kl: float,
    alone: Callable[[int], float],
    draws: int,
    seed: int,
) -> tuple[float, int]:
    """R = KL(all units quantized) / Σ KL(each alone), the sum estimated by sampling.

    Units are drawn with probability proportional to their predicted damage
    (with replacement), so few draws suffice where the prediction is good:
    Σ KL ≈ mean of KL_u / p_u (Hansen and Hurwitz, 1943).

    Returns:
        (R, number of distinct units measured); nan where no unit has damage.
    """
    predicted = np.maximum(damage[np.arange(len(choice)), choice], 0.0)
    total = float(predicted.sum())
    if total <= 0.0 or draws == 0:
        return float("nan"), 0
    # A floor keeps units that are wrongly predicted harmless in the sample.
    p = 0.8 * predicted / total + 0.2 / len(predicted)
    drawn = np.random.default_rng([seed, 3]).choice(len(p), size=draws, p=p)
    estimate = float(np.mean([alone(int(unit)) / p[unit] for unit in drawn]))
    return (measured_kl / estimate if estimate > 0 else float("nan")), len(set(drawn.tolist()))


def rank_correlation(predicted: list[float], measured: list[float]) -> float:
    """Spearman's ρ; nan with fewer than three policies or without variation."""
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, measured).statistic)


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return None if np.isnan(value) else value
