"""The slope of KL over squared noise, from direct measurements and in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bitsearch.models.weights import write_weight
from bitsearch.objectives.damage.noise_slope import LEVELS, noise_slope


def random_tokens(case: Any, scoring: Any) -> torch.Tensor:
    """The text that is drawn instead of the calibration tokens."""
    vocabulary = case.model.config.vocab_size
    return torch.randint(vocabulary, case.tokens.shape, generator=scoring.generator())


def relative_error(case: Any, scoring: Any, unit: int, candidate: int) -> float:
    """t² = ‖Ŵ − W‖² / ‖W‖² over the matrices of a unit."""
    error = size = 0.0
    for matrix in case.units[unit].matrices:
        error += float(scoring.error(matrix, candidate).double().square().sum())
        size += float(scoring.weights.reference(matrix).double().square().sum())
    return error / size


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_equals_a_least_squares_fit(family: str, case_of: Any) -> None:
    """Through the origin, of brute-force KL with the same noise."""
    case = case_of(family, num_hidden_layers=2)
    scoring = case.scoring("int3-g16,int4-g16", seed=9)
    before = case.state()
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    found = {(unit, c): value for unit, c, value in noise_slope(scoring, cells)}
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())
    tokens = random_tokens(case, scoring)
    reference = case.log_probabilities(tokens)
    for unit, scored in enumerate(case.units):
        damages = []
        for level, size in enumerate(LEVELS):
            generator = scoring.generator(unit, level)
            with scoring.weights.preserved(scored):
                for matrix in scored.matrices:
                    weight = scoring.weights.reference(matrix)
                    noise = torch.randn(weight.shape, generator=generator)
                    scale = size * float(weight.double().square().mean().sqrt())
                    write_weight(case.model, matrix, weight + scale * noise)
                changed = case.log_probabilities(tokens)
            damages.append(float((reference.exp() * (reference - changed)).sum(-1).mean()))
        squares = np.array(LEVELS)[:, None] ** 2
        (alpha,), *_ = np.linalg.lstsq(squares, np.array(damages), rcond=None)
        assert alpha > 0
        for candidate in (0, 1):
            expected = alpha * relative_error(case, scoring, unit, candidate)
            assert found[unit, candidate] == pytest.approx(expected, rel=2e-3)


def test_head_slope_in_closed_form(case_of: Any) -> None:
    """Noise n in the head gives E ½ Var_p(n x) = ½ ‖x‖² σ² (1 − Σ p²) a token."""
    case = case_of(windows=8, length=32)
    scoring = case.scoring("int4-g16")
    unit = len(case.units) - 1
    (matrix,) = case.units[unit].matrices
    tokens = random_tokens(case, scoring)
    with torch.no_grad():
        states = case.decoder.hidden(tokens).double()
    p = case.log_probabilities(tokens).exp()
    mean_square = float(scoring.weights.reference(matrix).square().mean())
    spread = 1 - p.square().sum(-1)
    alpha = float((0.5 * states.square().sum(-1) * mean_square * spread).mean())
    ((_, _, value),) = noise_slope(scoring, [(unit, 0)])
    assert value == pytest.approx(alpha * relative_error(case, scoring, unit, 0), rel=0.15)


def test_calibration_text_does_not_matter(case_of: Any) -> None:
    case = case_of()
    other = case.tokens.flip(0, 1)
    cells = [(1, 0), (4, 1)]
    one = list(noise_slope(case.scoring(), cells))
    assert one == list(noise_slope(case.scoring(tokens=other), cells))
    assert one != list(noise_slope(case.scoring(seed=1), cells))


def test_float64_weights_come_back_exactly(case_of: Any) -> None:
    case = case_of(dtype=torch.float64)
    before = case.state()
    list(noise_slope(case.scoring(), [(unit, 0) for unit in range(len(case.units))]))
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())
