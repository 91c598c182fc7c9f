"""Spread, additivity and rank correlation against what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitsearch.diagnostics import additivity, rank_correlation, sensitivity_spread
from bitsearch.formats import parse_formats
from bitsearch.space import Space, make_space
from bitsearch.units import Matrix, ModelLayout, Unit


def many_units(sizes: list[int]) -> Space:
    """Units of so many rows of 64 weights."""
    units = tuple(
        Unit(f"u{i}", "linear", (Matrix(f"u{i}.weight", size, 64),), i)
        for i, size in enumerate(sizes)
    )
    layout = ModelLayout("m", None, "M", "m", "float32", units, (), {})
    return make_space(layout, parse_formats("int{2,4,8}-g64,bf16"))


def damages(space: Space, sensitivity: np.ndarray) -> np.ndarray:
    """n_u s_u 4^(−b)."""
    parameters = np.array([unit.parameters for unit in space.units])
    widths = np.array([candidate.bits for candidate in space.candidates])
    return np.asarray((parameters * sensitivity)[:, None] * 4.0**-widths)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("bits", [2.2, 4.0, 7.5])
def test_spread_of_lognormal_sensitivities(sigma: float, bits: float) -> None:
    """Of log-normal values GM/AM is exp(−σ²/2)."""
    space = many_units([4] * 4000)
    logs = np.random.default_rng(0).normal(-3.0, sigma, 4000)
    found, ceiling = sensitivity_spread(damages(space, np.exp(logs)), space, bits)
    assert found == pytest.approx(sigma, rel=0.03)
    assert ceiling == pytest.approx(math.exp(-(sigma**2) / 2), rel=0.05)


def test_equal_sensitivities_leave_nothing_to_gain() -> None:
    space = many_units([1, 5, 9])
    sigma, ceiling = sensitivity_spread(damages(space, np.full(3, 0.2)), space, 4.0)
    assert sigma == pytest.approx(0.0, abs=1e-9) and ceiling == pytest.approx(1.0)


def test_spread_weighs_units_by_their_parameters() -> None:
    space = many_units([1, 3])
    sigma, ceiling = sensitivity_spread(damages(space, np.array([1.0, math.e**2])), space, 4.0)
    assert sigma == pytest.approx(2 * math.sqrt(0.25 * 0.75))
    assert ceiling == pytest.approx(math.exp(1.5) / (0.25 + 0.75 * math.e**2))


def test_the_ceiling_is_reached_by_the_best_continuous_widths() -> None:
    """Minimising Σ n s 4^(−b) at a mean width equalises s 4^(−b)."""
    sizes, s = np.array([2.0, 3.0, 7.0]), np.array([0.1, 2.0, 0.7])
    share = sizes / sizes.sum()
    best = 4.0 + (np.log2(s) - (share * np.log2(s)).sum()) / 2
    gain = (share * s * 4.0**-best).sum() / (share * s * 4.0**-4.0).sum()
    space = many_units([2, 3, 7])
    assert sensitivity_spread(damages(space, s), space, 4.0)[1] == pytest.approx(gain)


def test_units_without_damage_do_not_count() -> None:
    space = many_units([1, 1, 1])
    damage = damages(space, np.array([1.0, 1.0, 0.0]))
    damage[1] = np.inf
    assert sensitivity_spread(damage, space, 4.0) == pytest.approx((0.0, 1.0))
    assert np.isnan(sensitivity_spread(np.zeros((3, 4)), space, 4.0)).all()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_additive_damage_has_ratio_one(factor: float) -> None:
    """Also where the prediction is off by a factor: only measurements enter R."""
    alone = np.random.default_rng(0).exponential(size=50)
    damage = np.stack([factor * alone, np.zeros(50)], axis=1)
    choice = np.zeros(50, np.int64)
    ratio, units = additivity(damage, choice, alone.sum(), lambda u: alone[u], 400, 0)
    # the draws estimate the sum: their spread is small where the prediction is good
    assert ratio == pytest.approx(1.0, rel=0.1) and 1 <= units <= 50


def test_the_estimated_sum_is_unbiased() -> None:
    """Over many seeds, even with a poor prediction."""
    rng = np.random.default_rng(1)
    alone, predicted = rng.exponential(size=20), rng.exponential(size=20)
    sums = [
        alone.sum() / additivity(
            predicted[:, None], np.zeros(20, np.int64), alone.sum(), lambda u: alone[u], 40, seed
        )[0]
        for seed in range(300)
    ]  # fmt: skip
    assert np.mean(sums) == pytest.approx(alone.sum(), rel=0.05)


def test_interacting_units_show() -> None:
    ratio, _ = additivity(np.ones((10, 1)), np.zeros(10, np.int64), 30.0, lambda _: 1.0, 20, 0)
    assert ratio == pytest.approx(3.0)


def test_nothing_measured_gives_no_ratio() -> None:
    def never(_: int) -> float:
        raise AssertionError("measured for nothing")

    choice = np.zeros(3, np.int64)
    for damage, draws in ((np.zeros((3, 1)), 5), (np.ones((3, 1)), 0), (-np.ones((3, 1)), 5)):
        ratio, units = additivity(damage, choice, 1.0, never, draws, 0)
        assert math.isnan(ratio) and units == 0
    ratio, units = additivity(np.ones((3, 1)), choice, 1.0, lambda _: 0.0, 5, 0)
    assert math.isnan(ratio) and units >= 1


def test_negative_predictions_do_not_break_the_draw() -> None:
    """Tables of others may hold noise around zero."""
    damage = np.array([[1.0], [-0.5], [2.0]])
    ratio, _ = additivity(damage, np.zeros(3, np.int64), 3.0, lambda _: 1.0, 500, 0)
    assert ratio == pytest.approx(1.0, rel=0.1)


def test_rank_correlation() -> None:
    up = [1.0, 2.0, 3.0, 4.0]
    assert rank_correlation(up, [v**3 for v in up]) == pytest.approx(1.0)
    assert rank_correlation(up, [-v for v in up]) == pytest.approx(-1.0)
    # 1 − 6 Σd² / (n(n²−1)) with d = (0, 0, 1, −1)
    assert rank_correlation(up, [1.0, 2.0, 4.0, 3.0]) == pytest.approx(1 - 6 * 2 / 60)
    for predicted, measured in (([1.0, 2.0], [1.0, 2.0]), ([1.0] * 4, up), (up, [1.0] * 4)):
        assert math.isnan(rank_correlation(predicted, measured))
