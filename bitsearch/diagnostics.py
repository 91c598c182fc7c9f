"""How far a result can be trusted: spread, ceiling, additivity, rank correlation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bitsearch.solvers.problem import Choice
from bitsearch.space import Space


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
