"""Quality on real text: KL, perplexity, top-1 agreement, bootstrap intervals.

Results are kept per window, so that two policies are compared on the same
windows (paired) and nothing is ever measured twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.corpora import Corpus

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Quality:
    """Per-window means of one policy on one corpus, arrays of shape (windows,).

    Attributes:
        kl: KL(reference ‖ policy) in nats a token.
        nll: negative log likelihood in nats a token.
        top1: share of positions with the reference's top token.
    """

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    top1: NDArray[np.float64]

    @property
    def mean_kl(self) -> float:
        """Mean KL a token."""
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood; all windows are equally long."""
        return perplexity(self.nll)

    def on(self, corpus: Corpus, name: str) -> Quality:
        """The windows of one of the corpus's texts."""
        chosen = np.array([window == name for window in corpus.names])
        return Quality(self.kl[chosen], self.nll[chosen], self.top1[chosen])


def perplexity(nll: NDArray[np.float64]) -> float:
    """exp of the mean of (windows,) negative log likelihoods; at most e^700, so finite."""
    return math.exp(min(float(nll.mean()), 700.0))


def interval(values: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over windows.

    For a paired comparison give the differences. One window gives its own
    value twice: there is nothing to resample.
    """
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    from scipy.stats import bootstrap

    if np.ptp(values) == 0.0:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return float(found.low), float(found.high)


def summary(quality: Quality, reference_nll: NDArray[np.float64], corpus: Corpus) -> dict[str, Any]:
    """What is printed and stored of a quality."""
    texts = sorted(set(corpus.names))
    found: dict[str, Any] = {
        "kl": quality.mean_kl,
        "kl_ci": interval(quality.kl),
        "perplexity": quality.perplexity,
        "reference_perplexity": perplexity(reference_nll),
        "top1": float(quality.top1.mean()),
    }
    if len(texts) > 1:
        found["texts"] = {
            name: {
                "kl": quality.on(corpus, name).mean_kl,
                "perplexity": quality.on(corpus, name).perplexity,
            }
            for name in texts
        }
    return found
