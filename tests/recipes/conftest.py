"""Units of known weights and errors, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsearch.formats import parse_formats
from bitsearch.objectives.estimators import load_estimator
from bitsearch.recipes import load_recipe
from bitsearch.solvers import load_solver
from bitsearch.solvers.monotone import monotone
from bitsearch.solvers.problem import Problem
from bitsearch.units import Matrix, Unit


@pytest.fixture
def known() -> Callable[..., Any]:
    """`make_known`."""
    return make_known


@pytest.fixture
def table() -> Callable[[str, Any], NDArray[np.float64]]:
    """The damage table of a recipe's estimator."""

    def measured(name: str, scoring: Any) -> NDArray[np.float64]:
        damage = np.full((len(scoring.units), len(scoring.candidates)), np.nan)
        cells = [(int(u), int(c)) for u, c in np.argwhere(np.isnan(damage))]
        for unit, candidate, value in load_estimator(str(load_recipe(name).damage))(scoring, cells):
            damage[unit, candidate] = value
        return damage

    return measured


@pytest.fixture
def chosen() -> Callable[..., list[int]]:
    """What a recipe's solver chooses, after the table is made monotone as every search does."""

    def solved(
        name: str, damage: NDArray[np.float64], costs: list[list[int]], budget: int
    ) -> list[int]:
        sizes = np.array(costs)
        problem = Problem(monotone(damage, sizes), sizes[None], np.array([budget]))
        solver = load_solver(str(load_recipe(name).solver))
        found: list[int] = solver(problem, seed=0).choice.tolist()
        return found

    return solved


def make_known(
    formats: str,
    errors: dict[str, Sequence[Sequence[float]]],
    weights: dict[str, Any] | None = None,
) -> Any:
    """The input of an estimator: one linear unit a name.

    Args:
        formats: candidates.
        errors: Δ of each candidate, a flat (weights,) list, by unit name.
        weights: reference weights by unit name, where an estimator asks for them.
    """
    units = [
        Unit(name, "linear", (Matrix(f"{name}.weight", 1, len(rows[0])),), block)
        for block, (name, rows) in enumerate(errors.items())
    ]

    def error(matrix: Matrix, candidate: int) -> Tensor:
        return torch.tensor([errors[matrix.module][candidate]])

    def reference(matrix: Matrix) -> Tensor:
        return torch.tensor([(weights or {})[matrix.module]])

    return SimpleNamespace(
        units=units,
        candidates=parse_formats(formats),
        error=error,
        weights=SimpleNamespace(reference=reference),
        tokens=torch.zeros(1, 4, dtype=torch.long),
        decoder=SimpleNamespace(config=SimpleNamespace(vocab_size=8), blocks=[None]),
        generator=lambda *key: torch.Generator().manual_seed(0),
    )
