"""AMQ's score equals the divergence of the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitsearch.objectives.damage.jsd_from_widest import jsd_from_widest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_the_divergence_of_the_whole_model(family: str, case_of: Any) -> None:
    """One unit at 2 bits, all others at 4, the 4-bit candidate being neither first nor last."""
    case = case_of(family, num_hidden_layers=2, windows=2)
    scoring = case.scoring("int2-g16,int4-g16,int3-g16")
    p = case.log_probabilities().exp()
    cells = [(unit, 0) for unit in range(len(case.units))]
    found = {unit: value for unit, _, value in jsd_from_widest(scoring, cells)}
    for index, unit in enumerate(case.units):
        formats = [scoring.candidates[0 if one is unit else 1] for one in case.units]
        with scoring.weights.applied(list(zip(case.units, formats, strict=True))):
            q = case.log_probabilities().exp()
        m = (p + q) / 2
        terms = p * (p / m).log() + q * (q / m).log()
        assert found[index] == pytest.approx(float(terms.sum(-1).mean() / 2), rel=2e-3)
    assert len({round(value, 9) for value in found.values()}) > 1
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
