"""Power iteration finds the top eigenvalue of each unit's block of the full Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitsearch.objectives.damage import hessian_eigenvalue as module
from bitsearch.objectives.damage.hessian_eigenvalue import (
    hessian_eigenvalue,
    hessian_eigenvalue_ranking,
    top_eigenvalue,
)


@pytest.fixture(params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, minute: Any) -> Any:
    changes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 6}
    family = request.param
    return minute(family, num_hidden_layers=1, windows=2, **(changes if family == "gpt2" else {}))


def block(case: Any, unit: Any) -> Tensor:
    """(weights, weights) Hessian of the mean loss over a unit's weights."""
    weights = {m.name: case.model.get_parameter(m.name) for m in unit.matrices}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        values = {name: part.view_as(weight) for (name, weight), part in parts}
        logits = functional_call(case.model, values, kwargs={"input_ids": case.tokens}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten())

    with sdpa_kernel(SDPBackend.MATH):
        return hessian(loss)(torch.cat([w.detach().flatten() for w in weights.values()]))


def test_equals_the_full_hessians_top_eigenvalue(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an eigenvalue below zero is the largest in size."""
    monkeypatch.setattr(module, "ITERATIONS", 400)
    monkeypatch.setattr(module, "TOLERANCE", 1e-7)
    largest_is_negative = 0
    for index, unit in enumerate(case.units):
        exact = torch.linalg.eigvalsh(block(case, unit))
        largest_is_negative += bool(-exact[0] > exact[-1])
        found = top_eigenvalue(case.scoring(), index)
        assert found == pytest.approx(float(exact[-1]), rel=5e-3), unit.name
    if case.layout.model_type == "llama":
        assert largest_is_negative


def test_both_damages_follow_from_the_eigenvalue(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """½ · 6 · ‖Δ‖², and 6 / n · 4^(−bits); nothing below a negative eigenvalue."""
    scoring = case.scoring("int2-g4,int4-g4")
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    monkeypatch.setattr(module, "top_eigenvalue", lambda scoring, unit: -1.0 if unit == 1 else 6.0)
    ranking = {cell[:2]: cell[2] for cell in hessian_eigenvalue_ranking(scoring, cells)}
    for unit, candidate, value in hessian_eigenvalue(scoring, cells):
        matrices = case.units[unit].matrices
        error = sum(float(scoring.error(m, candidate).double().square().sum()) for m in matrices)
        weights = sum(m.parameters for m in matrices)
        known = 0.0 if unit == 1 else 1.0
        assert value == pytest.approx(known * 3.0 * error, rel=1e-5)
        bits = (2, 4)[candidate]
        assert ranking[unit, candidate] == pytest.approx(known * 6.0 / weights / 4**bits)


def test_a_unit_without_influence_has_none(minute: Any) -> None:
    """Where the head is zero nothing before it changes the loss."""
    case = minute(num_hidden_layers=1, windows=1)
    case.model.lm_head.weight.zero_()
    assert top_eigenvalue(case.scoring(), 1) == 0.0
