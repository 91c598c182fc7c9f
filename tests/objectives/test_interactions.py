"""The sketch of the Fisher matrix against its definition, and the shrinkage against the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitsearch.objectives import interactions
from bitsearch.objectives.damage.gradients import sample
from bitsearch.objectives.interactions import correlations, pair_terms, score_sketch
from bitsearch.objectives.teacher import Teacher


def quiet(done: int, total: int) -> None:
    """No progress."""


def errors(case: Any, scoring: Any) -> list[list[dict[str, torch.Tensor]]]:
    """Δ of every unit and candidate, as parameters are stored."""
    return [
        [
            {
                m.name: (scoring.error(m, c).double().mT if m.transposed else scoring.error(m, c))
                .reshape(case.model.get_parameter(m.name).shape)
                .double()
                for m in unit.matrices
            }
            for c in range(len(scoring.candidates))
        ]
        for unit in case.units
    ]


def products(case: Any, scoring: Any, losses: list[torch.Tensor]) -> Any:
    """(losses, units · candidates) derivatives of losses along each Δ, one backward each."""
    moves = [cell for unit in errors(case, scoring) for cell in unit]
    parameters = dict(case.model.named_parameters())
    rows = []
    for loss in losses:
        found = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        gradients = dict(zip(parameters, found, strict=True))
        rows.append(
            [sum(float((gradients[n] * d).sum()) for n, d in move.items()) for move in moves]
        )
    return np.array(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_each_sample_is_a_score_times_every_error(family: str, minute: Any) -> None:
    case = minute(family, windows=2)
    scoring = case.scoring("int2-g16,int4-g16", seed=3)
    sketch = score_sketch(scoring, 2, quiet)
    case.model.requires_grad_(True)
    expected = []
    for index, window in enumerate(case.tokens):
        generator = scoring.generator(index)
        logits = case.model(input_ids=window[None]).logits[0]
        labels = [sample(logits, generator) for _ in range(2)]
        losses = [F.cross_entropy(logits, drawn, reduction="sum") for drawn in labels]
        expected.append(products(case, scoring, losses))
    case.model.requires_grad_(False)
    scale = (2 * case.tokens.shape[1]) ** -0.5
    assert sketch.shape == (2, 2, len(case.units), 2)
    assert np.array(expected).reshape(sketch.shape) * scale == pytest.approx(
        sketch, rel=1e-3, abs=1e-6
    )


def test_second_moments_are_the_fisher_matrix(minute: Any) -> None:
    """Σ over positions and all labels, each token's score by a backward pass of its own."""
    case = minute(windows=1)
    scoring = case.scoring("int2-g16,int3-g16")
    case.model.requires_grad_(True)
    logits = case.model(input_ids=case.tokens).logits[0].log_softmax(-1)
    scores = products(case, scoring, [-entry for entry in logits.flatten()])
    case.model.requires_grad_(False)
    shares = logits.detach().exp().flatten().numpy()
    exact = (scores.T * shares) @ scores / (2 * case.tokens.shape[1])
    samples = score_sketch(scoring, 2000, quiet).reshape(2000, -1).astype(float)
    found = samples.T @ samples / len(samples)
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs(found - exact).max() < (6 / 2000**0.5 * size).max()
    assert np.abs((found - exact) / size).mean() < 0.04
    assert np.abs(exact / size - np.eye(len(size))).mean() > 0.1  # there is something to find


def test_predicts_the_kl_of_all_units_together(case_of: Any) -> None:
    """What one position's scores alone would miss is in it."""
    case = case_of("llama", windows=8, length=48)
    scoring = case.scoring("int6-g16")
    sketch = score_sketch(scoring, 64, quiet)[..., 0]
    predicted = np.square(sketch.sum(axis=2)).mean()
    teacher = Teacher(case.decoder, case.tokens, restart=False)
    with scoring.weights.applied([(unit, scoring.candidates[0]) for unit in case.units]):
        measured = float(teacher.kl().mean())
    assert predicted == pytest.approx(measured, rel=0.3)


def test_units_may_come_in_groups(case_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("gemma2", windows=2)
    scoring = case.scoring("int3-g16,bf16")
    steps: list[tuple[int, int]] = []
    whole = score_sketch(scoring, 2, quiet)
    monkeypatch.setattr(interactions, "available_bytes", lambda device: 3 * 8 * 3000)
    parts = score_sketch(scoring, 2, lambda done, total: steps.append((done, total)))
    assert np.allclose(whole, parts, rtol=1e-4, atol=1e-7)
    assert steps[-1][0] == steps[-1][1] == len(steps) > 4
    assert all(parameter.grad is None for parameter in case.model.parameters())


def drawn(rng: Any, truth: Any, windows: int, draws: int, sizes: Any) -> Any:
    """Normal samples of one candidate a unit with known correlations."""
    root = np.linalg.cholesky(truth)
    samples = rng.normal(size=(windows, draws, len(truth))) @ root.T * sizes
    return samples[..., None].astype(np.float32)


def correlated(rng: Any, units: int, share: float) -> Any:
    """A correlation matrix with a common factor and noise."""
    loads = rng.normal(size=(units, 3))
    truth = share * loads @ loads.T / 3 + np.eye(units)
    size = np.sqrt(np.diag(truth))
    return truth / size / size[:, None]


@pytest.mark.parametrize("share", [0.03, 0.2, 1.0])
@pytest.mark.parametrize("windows, draws", [(16, 8), (1, 128), (64, 32)])
def test_strength_is_nearly_the_best_one(share: float, windows: int, draws: int) -> None:
    rng = np.random.default_rng(0)
    units = 60
    truth = correlated(rng, units, share)
    sketch = drawn(rng, truth, windows, draws, np.exp(rng.normal(size=units)))
    found, strength = correlations(sketch)
    shrunk = found[:, 0, :, 0]
    assert np.diag(shrunk) == pytest.approx(np.full(units, strength)) and 0 <= strength <= 1
    off = ~np.eye(units, dtype=bool)
    raw = np.corrcoef(sketch[..., 0].reshape(-1, units).T)
    losses = [np.square(s * raw - truth)[off].sum() for s in np.linspace(0, 1, 101)]
    assert np.square(shrunk - truth)[off].sum() < 1.2 * min(losses)
    assert np.linalg.eigvalsh(shrunk)[0] > -1e-5


def test_unrelated_errors_have_no_pair_terms() -> None:
    rng = np.random.default_rng(1)
    sketch = drawn(rng, np.eye(80), 16, 16, np.ones(80))
    found, strength = correlations(sketch)
    assert strength < 0.05
    silent = np.zeros_like(sketch)
    assert correlations(silent)[1] == 0.0 and not correlations(silent)[0].any()
    assert np.isfinite(found).all()


def test_pair_terms_complete_the_square() -> None:
    """Two errors of correlation ρ: ½ (a + b)² = ½ a² + ½ b² + ρ a b."""
    damage = np.array([[0.5, 2.0], [8.0, np.inf]])
    correlation = np.zeros((2, 2, 2, 2), np.float32)
    correlation[0, 1, 1, 0] = correlation[1, 0, 0, 1] = 0.25
    pairs = pair_terms(damage, correlation)
    assert pairs[0, 1, 1, 0] == pytest.approx(2 * 0.25 * 4.0)
    assert np.isfinite(pairs).all() and pairs.sum() == pytest.approx(4.0)
