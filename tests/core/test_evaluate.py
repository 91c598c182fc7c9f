"""Perplexity, bootstrap intervals and paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bitsearch.corpora import Corpus
from bitsearch.evaluate import Quality, interval, perplexity, summary


def quality(kl: list[float], nll: list[float]) -> Quality:
    """A quality with a made-up agreement."""
    return Quality(np.array(kl), np.array(nll), np.linspace(0.5, 1.0, len(kl)))


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    found = quality([0.1, 0.3], [2.0, 4.0])
    assert found.perplexity == pytest.approx(math.e**3)
    assert found.mean_kl == pytest.approx(0.2)


def test_a_destroyed_model_has_a_finite_perplexity() -> None:
    """So that results stay valid JSON."""
    for value in (700.0, 1e6):
        assert math.isfinite(perplexity(np.array([value])))
    assert perplexity(np.array([709.0])) >= perplexity(np.array([699.0]))


@pytest.mark.parametrize("size", [20, 200])
def test_the_interval_is_that_of_the_mean(size: int) -> None:
    """For bell-shaped values it is close to mean ± 1.96 s/√n, s the plug-in deviation."""
    values = np.random.default_rng(size).normal(3.0, 0.5, size)
    low, high = interval(values)
    half = 1.96 * values.std() / math.sqrt(size)
    assert low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_the_interval_agrees_with_an_exact_bootstrap() -> None:
    """Of two values, resamples are (a,a), (a,b), (b,a), (b,b): 2.5 % lies at the ends."""
    assert interval(np.array([1.0, 5.0])) == (1.0, 5.0)
    # of a share, resampled sums are binomial
    values = np.array([1.0] * 30 + [0.0] * 70)
    expected = stats.binom(100, 0.3).ppf([0.025, 0.975]) / 100
    assert np.allclose(interval(values), expected, atol=0.011)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of skewed values, as KL over windows is: nearly 95 % of intervals hold the truth."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = interval(rng.lognormal(0, 0.5, 40), seed=seed)
        held += low <= math.exp(0.125) <= high
    assert 0.88 <= held / 200 <= 0.99


def test_few_or_equal_values_give_a_point() -> None:
    assert interval(np.array([0.25])) == (0.25, 0.25)
    assert interval(np.full(9, 0.1)) == (0.1, 0.1)


def test_the_interval_is_reproducible_and_shifts_with_the_values() -> None:
    values = np.random.default_rng(1).exponential(size=30)
    low, high = interval(values)
    assert interval(values) == (low, high)
    assert np.allclose(interval(values + 10), (low + 10, high + 10))
    assert np.allclose(interval(3 * values), (3 * low, 3 * high))


def test_pairing_sees_what_separate_intervals_hide() -> None:
    """Windows differ far more from each other than two policies do on one window."""
    rng = np.random.default_rng(2)
    first = rng.lognormal(0, 1, 32)
    second = first * 1.05 + rng.normal(0, 0.005, 32)
    assert interval(first)[1] > interval(second)[0]
    low, high = interval(first - second)
    assert low < high < 0


def test_summary_is_split_by_text() -> None:
    corpus = Corpus("evaluation", ("b", "a", "b"), torch.zeros(3, 4, dtype=torch.int64), "x")
    found = summary(quality([0.1, 0.4, 0.3], [1.0, 2.0, 3.0]), np.array([1.0, 1.5, 2.0]), corpus)
    assert found["kl"] == pytest.approx(0.8 / 3)
    assert found["reference_perplexity"] == pytest.approx(math.exp(1.5))
    assert found["top1"] == pytest.approx(0.75)
    assert found["kl_ci"][0] <= found["kl"] <= found["kl_ci"][1]
    assert set(found["texts"]) == {"a", "b"}
    assert found["texts"]["b"]["kl"] == pytest.approx(0.2)
    assert found["texts"]["a"]["perplexity"] == pytest.approx(math.exp(2.0))
    alone = Corpus("evaluation", ("a",), torch.zeros(1, 4, dtype=torch.int64), "x")
    assert "texts" not in summary(quality([0.1], [1.0]), np.array([1.0]), alone)
