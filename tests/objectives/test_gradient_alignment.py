"""mlx-lm's sensitivities by hand, and the gradient at the low model by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitsearch.objectives.damage import gradient_alignment as module
from bitsearch.objectives.damage.gradient_alignment import gradient_alignment, low_gradient


def test_score_by_hand(case_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient 2 everywhere; high − W = 0, low − W = 0.003 on all n weights.

    10⁶/n · Σ 2 · (0.003 − 0) = 10⁶/n · 0.006 n = 6000; the candidate between, at 0.001,
    has 2000, and the high one 0. A gradient of −2 gives the lowest score in place of −6000.
    """
    case = case_of(num_hidden_layers=1)
    scoring = case.scoring("int2-g16,int4-g16,int6-g16")
    change = (0.003, 0.001, 0.0)
    monkeypatch.setattr(
        type(scoring),
        "error",
        lambda self, m, c: torch.full((m.count * m.out_features, m.in_features), change[c]),
    )
    slopes = {name: torch.full_like(p, 2.0) for name, p in case.model.named_parameters()}
    down = case.units.index(case.unit("mlp.down_proj"))
    slopes[case.units[down].matrices[0].name].fill_(-2.0)
    monkeypatch.setattr(module, "low_gradient", lambda *_: slopes)
    cells = [(unit, c) for unit in (1, down) for c in (0, 1, 2)]
    found = [value for _, _, value in gradient_alignment(scoring, cells)]
    assert found[:3] == pytest.approx([6000.0, 2000.0, 0.0], rel=1e-5)
    assert 0 < found[3] < 1e-30 and 0 < found[4] < 1e-30 and found[5] == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_is_the_slope_of_kl_at_the_low_model(family: str, case_of: Any) -> None:
    """Central differences of the mean KL along one direction in each unit."""
    case = case_of(family, dtype=torch.float64, num_hidden_layers=1, windows=2)
    scoring = case.scoring("int6-g16,int2-g16")  # the low candidate is the second
    gradients = low_gradient(scoring, range(len(case.units)))
    reference = case.log_probabilities()

    def kl() -> float:
        return float(((reference - case.log_probabilities()) * reference.exp()).sum(-1).mean())

    low = [(unit, scoring.candidates[1]) for unit in case.units]
    with scoring.weights.applied(low):
        for unit in case.units:
            parameter = case.model.get_parameter(unit.matrices[0].name)
            generator = torch.Generator().manual_seed(1)
            step = 1e-3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            step += 1e-3 * parameter  # some change that matters
            before = parameter.clone()
            losses = []
            for side in (1, -1):
                parameter.copy_(before + side * step)
                losses.append(kl())
            parameter.copy_(before)
            slope = float((gradients[unit.matrices[0].name] * step).sum())
            assert slope == pytest.approx((losses[0] - losses[1]) / 2, rel=2e-2, abs=1e-6)
