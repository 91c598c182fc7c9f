"""How units' quantization errors add up or cancel: the Fisher matrix, sketched.

    KL a token ≈ (1/2L) E (Σ_u g·Δ_u)²

g is the gradient of the loss of a window of L tokens, summed over its tokens,
labels drawn from the model. Given the text the labels are independent and each
token's score has mean zero, so that products of different tokens' scores vanish
in the mean and E g gᵀ = Σ_t F_t, the curvature of the summed KL (Martens, "New
insights and perspectives on the natural gradient method", JMLR 21, 2020,
section 9). A score of position t in a unit's output, ∂(Σℓ)/∂y_t · Δ x_t, is no
substitute: summing its squares drops what errors at different positions of one
unit have in common. One backward pass gives g·Δ of every unit and candidate,
and N of them every pair, with a relative error of about √(2/N).

Fails where KL is no longer quadratic in the errors (2 bits), and where N is
small: a search over a raw sketch finds errors that cancel by chance. Hence the
shrinkage (`correlations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from bitsearch.objectives.damage.gradients import differentiable, oriented, sample
from bitsearch.objectives.damage.scoring import Scoring
from bitsearch.objectives.memory import available_bytes

Sketch = NDArray[np.float32]


def score_sketch(scoring: Scoring, draws: int, done: Callable[[int, int], None]) -> Sketch:
    """Products g·Δ of label draws with every unit's error in every candidate.

    Args:
        scoring: what is scored; each window gives `draws` samples.
        draws: label draws, and so backward passes, a window.
        done: called with finished and all backward passes.

    Returns:
        (windows, draws, units, candidates), scaled by 1/√(2L), so that the mean
        over samples of the square of a sum over units predicts KL a token.
    """
    windows, length = scoring.tokens.shape
    shape = (windows, draws, len(scoring.units), len(scoring.candidates))
    sketch = np.zeros(shape, np.float32)
    groups = list(_groups(scoring))
    steps = 0
    for group in groups:
        matrices = [matrix for unit in group for matrix in scoring.units[unit].matrices]
        owners = [unit for unit in group for _ in scoring.units[unit].matrices]
        errors = [
            torch.stack([scoring.error(m, c).flatten() for c in range(len(scoring.candidates))])
            for m in matrices
        ]
        with differentiable(scoring.decoder, matrices) as parameters:
            for index, window in enumerate(scoring.tokens.to(scoring.decoder.device)):
                generator = scoring.generator(index)
                logits = scoring.decoder.logits(scoring.decoder.hidden(window[None]))[0]
                for draw in range(draws):
                    loss = F.cross_entropy(logits, sample(logits, generator), reduction="sum")
                    gradients = torch.autograd.grad(
                        loss, parameters, retain_graph=draw + 1 < draws, materialize_grads=True
                    )
                    for unit, matrix, error, gradient in zip(
                        owners, matrices, errors, gradients, strict=True
                    ):
                        product = error @ oriented(matrix, gradient).flatten().float()
                        sketch[index, draw, unit] += product.cpu().numpy()
                    steps += 1
                    done(steps, len(groups) * windows * draws)
    return sketch / np.float32((2 * length) ** 0.5)


def _groups(scoring: Scoring) -> Iterator[list[int]]:
    """Units whose errors in all candidates fit into memory together."""
    room = available_bytes(scoring.decoder.device) // 3
    each = [4 * len(scoring.candidates) * unit.parameters for unit in scoring.units]
    group: list[int] = []
    for unit, size in enumerate(each):
        if group and sum(each[u] for u in group) + size > room:
            yield group
            group = []
        group.append(unit)
    yield group


def correlations(sketch: Sketch) -> tuple[NDArray[np.float32], float]:
    """Correlations of units' errors, shrunk towards none, and by how much.

    The strength s that all correlations between units are multiplied with is
    chosen on held-out samples: with R₁, R₂ those of two halves of the windows,
    s₁ = ⟨R₁, R₂⟩ / ⟨R₁, R₁⟩ brings s R₁ nearest to R₂; for the mean over both,
    which has half the noise, that is 2 s₁ / (1 + s₁) (Spearman and Brown).
    Shrinking to the diagonal: Ledoit and Wolf, J. Multivariate Analysis 88, 2004.

    Args:
        sketch: (windows, draws, units, candidates); two samples at least.

    Returns:
        (units, candidates, units, candidates), positive semidefinite, and s in
        [0, 1]. The blocks of a unit with itself are shrunk like all others.
    """
    windows, draws, units, candidates = sketch.shape
    cells = units * candidates
    first = np.arange(windows * draws) % 2 == 0 if windows == 1 else _half(windows, draws)
    samples = sketch.reshape(-1, cells)
    size = np.sqrt(np.square(samples, dtype=np.float64).mean(axis=0))
    scaled = samples / np.where(size > 0, size, 1.0).astype(np.float32)
    halves = [scaled[half].T @ scaled[half] / half.sum() for half in (first, ~first)]
    owner = np.repeat(np.arange(units), candidates)
    between = owner[:, None] != owner
    one, other = (half[between].astype(np.float64) for half in halves)
    agreement, total = float(one @ other), float(one @ one + other @ other) / 2
    strength = 0.0
    if total > 0:
        strength = float(np.clip(2 * agreement / (agreement + total), 0.0, 1.0))
    whole = scaled.T @ scaled / len(scaled)
    shrunk: NDArray[np.float32] = (strength * whole).astype(np.float32)
    return shrunk.reshape(units, candidates, units, candidates), strength


def _half(windows: int, draws: int) -> NDArray[np.bool_]:
    """Samples of every other window: other text, not only other labels."""
    return np.repeat(np.arange(windows) % 2 == 0, draws)


def pair_terms(
    damage: NDArray[np.float64], correlation: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Damage of pairs, 2 ρ √(d d'): sizes from a damage table, correlations from a sketch.

    Args:
        damage: (units, candidates), +inf where not allowed.
        correlation: (units, candidates, units, candidates).
    """
    root = np.sqrt(np.where(damage < np.inf, np.maximum(damage, 0.0), 0.0)).astype(np.float32)
    pairs: NDArray[np.float32] = 2 * root[:, :, None, None] * correlation * root
    return pairs
