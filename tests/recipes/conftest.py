"""Units of known weights and errors, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch.formats import parse_formats
from bitsearch.units import Matrix, Unit


@pytest.fixture
def known() -> Callable[..., Any]:
    """`make_known`."""
    return make_known


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
