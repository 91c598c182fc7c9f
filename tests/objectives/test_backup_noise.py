"""NNCF's criteria by hand, and their inputs on a real forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitsearch.formats import parse_formats
from bitsearch.objectives.damage import backup_noise
from bitsearch.objectives.damage.backup_noise import (
    hessian_input_activation,
    weight_quantization_error,
)
from bitsearch.units import Matrix, Unit

# 8-bit errors of two units; the 4-bit ones must not matter.
NOISE = {"a": [[0.1, -0.1], [0.2, 0.0]], "b": [[0.01, 0.03]], "e": [[0.5, 0.5]]}


def scoring(formats: str = "int4-g2,int8-row") -> Any:
    """Units `a`, `b` and an embedding `e`, of known errors in the 8-bit candidate."""
    units = [
        Unit(name, kind, (Matrix(f"{name}.weight", len(NOISE[name]), 2),))
        for name, kind in (("a", "linear"), ("b", "linear"), ("e", "embedding"))
    ]
    widest = len(parse_formats(formats)) - 1

    def error(matrix: Matrix, candidate: int) -> Any:
        assert candidate == widest
        return torch.tensor(NOISE[matrix.module])

    return SimpleNamespace(
        units=units, candidates=parse_formats(formats), error=error, tokens=None, decoder=None
    )


def test_data_free_score_by_hand() -> None:
    """a: rows of (0.01 + 0.01)/2 = 0.01 and 0.04/2 = 0.02, the worst 0.02: 1/0.02 = 50.

    b: (0.0001 + 0.0009)/2 = 0.0005: 2000. So b, the less noisy, is the more sensitive.
    """
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = {cell[:2]: cell[2] for cell in weight_quantization_error(scoring(), cells)}
    assert found[0, 0] == pytest.approx(50.0, rel=1e-4)
    assert found[1, 0] == pytest.approx(2000.0, rel=1e-3)
    assert found[0, 1] == found[1, 1] == 0.0


def test_hessian_score_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """a: ‖Δ‖ = √0.06 = 0.244949, mean x² = (1 + 3)/2 = 2, so 0.244949 · 2 · 2 = 0.979796.

    b: ‖Δ‖ = √0.001 = 0.0316228, mean x² = 5, so 0.316228. The embedding is the lowest.
    """
    means = {"a.weight": torch.tensor([1.0, 3.0]), "b.weight": torch.tensor([5.0, 5.0])}
    means["e.weight"] = torch.tensor([1e9, 1e9])
    monkeypatch.setattr(backup_noise, "input_mean_squares", lambda *_: (means, {}))
    found = {
        cell[0]: cell[2] for cell in hessian_input_activation(scoring(), [(0, 0), (1, 0), (2, 0)])
    }
    assert found[0] == pytest.approx(0.979796, rel=1e-5)
    assert found[1] == pytest.approx(0.316228, rel=1e-5)
    assert 0 < found[2] < 1e-30


def test_bits_given_up_scale_the_score() -> None:
    """Of 2, 4 and 8 bits: 6/6, 4/6 and 0 of a's 50."""
    cells = [(0, 0), (0, 1), (0, 2)]
    found = [cell[2] for cell in weight_quantization_error(scoring("int{2,4}-g2,int8-row"), cells)]
    assert found == pytest.approx([50.0, 50.0 * 4 / 6, 0.0], rel=1e-4)


def test_inputs_are_the_units_own(case_of: Any, captured: Any) -> None:
    """2 · mean x² of the module's input, by the model's own forward pass."""
    case = case_of(num_hidden_layers=1)
    unit = case.unit("mlp.down_proj")
    index = case.units.index(unit)
    scoring = case.scoring("int3-g16,int8-g16")
    x = captured(case, [unit.matrices[0].module])[unit.matrices[0].module]
    noise = float(scoring.error(unit.matrices[0], 1).double().norm())
    ((_, _, value),) = hessian_input_activation(scoring, [(index, 0)])
    assert value == pytest.approx(2 * float(x.square().mean()) * noise, rel=1e-4)
