"""Hutchinson's estimate converges to the trace of the full Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitsearch.objectives.damage import hessian_trace as module
from bitsearch.objectives.damage.hessian_trace import hessian_trace, hutchinson

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 6},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 8},
}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, minute: Any) -> Any:
    family = request.param
    return minute(family, num_hidden_layers=1, windows=2, dtype=torch.float32, **FAMILIES[family])


def full_hessians(case: Any) -> Tensor:
    """(windows, weights, weights) float64 Hessians of each window's loss, all units at once."""
    model = case.model.double()
    model.set_experts_implementation("eager")
    weights = {m.name: model.get_parameter(m.name) for u in case.units for m in u.matrices}
    sizes = [weight.numel() for weight in weights.values()]
    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])

    def loss(flat: Tensor, window: Tensor) -> Tensor:
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        values = {name: part.view_as(weight) for (name, weight), part in parts}
        logits = functional_call(model, values, kwargs={"input_ids": window[None]}).logits[0]
        return F.cross_entropy(logits[:-1], window[1:])

    with sdpa_kernel(SDPBackend.MATH):
        found = torch.stack([hessian(loss)(flat, window) for window in case.tokens])
    case.model.float()
    return found


def by_unit(case: Any, entries: Tensor) -> list[float]:
    """Sums of (weights,) entries over the weights of each unit."""
    return [float(part.sum()) for part in entries.split([u.parameters for u in case.units])]


def test_each_draw_is_the_product_with_the_full_hessian(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draw k adds z ⊙ H z of window k, for the z that was drawn."""
    drawn: list[Tensor] = []
    draw = module._signs

    def noted(*args: Any) -> Tensor:
        signs = draw(*args)
        drawn.append(signs.double().flatten())
        return signs

    monkeypatch.setattr(module, "_signs", noted)
    found = hutchinson(case.scoring(seed=3), draws=4)
    z = torch.cat(drawn).view(4, -1)
    assert torch.equal(z.abs(), torch.ones_like(z)) and len(z.unique(dim=0)) == 4
    curvature = full_hessians(case)[[0, 1, 0, 1]]
    products = (z * torch.einsum("dij,dj->di", curvature, z)).mean(0)
    assert found == pytest.approx(by_unit(case, products), rel=1e-3, abs=1e-4)


def test_signs_are_fair_and_independent() -> None:
    """The mean of z zᵀ over 5000 draws is the identity within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([module._signs(torch.zeros(3, 2), generator) for _ in range(5_000)])
    z = draws.flatten(1)
    assert torch.all(z.mean(0).abs() < 5 / len(z) ** 0.5)
    assert torch.all((z.mT @ z / len(z) - torch.eye(6)).abs() < 5 / len(z) ** 0.5)


def test_mean_of_draws_converges_to_the_trace(case: Any) -> None:
    """Every unit within 4 standard errors, which are small beside the traces."""
    draws = np.array([hutchinson(case.scoring(seed=seed), draws=2) for seed in range(60)])
    mean, error = draws.mean(0), draws.std(0, ddof=1) / len(draws) ** 0.5
    exact = np.array(by_unit(case, full_hessians(case).mean(0).diagonal()))
    assert np.all(np.abs(mean - exact) <= 4 * error)
    assert np.linalg.norm(error) < 0.5 * np.linalg.norm(exact)


def test_damage_is_half_mean_curvature_times_error(case: Any) -> None:
    scoring = case.scoring("int2-g4,int4-g4", seed=5)
    traces = hutchinson(scoring, draws=32)
    cells = [(unit, c) for unit in range(len(case.units)) for c in (0, 1)]
    for unit, candidate, value in hessian_trace(scoring, cells):
        error = sum(
            float(scoring.error(matrix, candidate).double().square().sum())
            for matrix in case.units[unit].matrices
        )
        curvature = max(0.0, traces[unit]) / case.units[unit].parameters
        assert value == pytest.approx(0.5 * curvature * error, rel=1e-5)


@pytest.mark.parametrize(("windows", "draws"), [(1, 32), (2, 32), (20, 40), (40, 40)])
def test_every_window_takes_part_equally_often(
    windows: int, draws: int, minute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = minute(windows=windows)
    asked: list[int] = []

    def note(scoring: Any, draws: int) -> list[float]:
        asked.append(draws)
        return [0.0] * len(case.units)

    monkeypatch.setattr(module, "hutchinson", note)
    list(hessian_trace(case.scoring(), [(1, 0)]))
    assert asked == [draws]
