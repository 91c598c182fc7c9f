"""What a search would do, from the configuration alone: range, size, time, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitsearch.budget import check_feasible, parse_budget
from bitsearch.formats import parse_formats
from bitsearch.models.load import open_layout
from bitsearch.settings import DEFAULT_LENGTH, DEFAULT_WINDOWS, parse_windows
from bitsearch.space import Space, make_space

# Multiplications a second that a forward pass reaches on one core in float32; the
# estimate of time is stated with it.
_CORE_FLOPS = 4e10


def make_plan(
    model: str,
    budgets: Sequence[str],
    *,
    candidates: str,
    frozen: Mapping[str, str],
    fuse: bool,
    revision: str | None,
) -> dict[str, Any]:
    """Feasible range, units, candidate sizes, and the cost of a default search.

    Raises:
        InfeasibleBudget: a budget is outside of the achievable range.
    """
    layout, _, _ = open_layout(model, revision=revision, fuse=fuse)
    space = make_space(layout, parse_formats(candidates), frozen)
    parsed = [parse_budget(text, space) for text in budgets]
    check_feasible(parsed, space)
    low, high = space.byte_range()
    parameters = layout.parameters
    return {
        "model": model,
        "architecture": layout.architecture,
        "parameters": parameters,
        "bytes_16bit": 2 * parameters,
        "range": {
            "bytes": [low, high],
            "bpw": [8 * low / parameters, 8 * high / parameters],
        },
        "budgets": [
            {
                "text": budget.text,
                "bytes": budget.limit,
                "scope": "linear" if budget.linear_only else "all",
                "uniform": _widest_uniform(space, budget.limit),
            }
            for budget in parsed
        ],
        "candidates": [
            {
                "name": candidate.name,
                "bytes": sum(int(b) for b in space.bytes[:, column]) + layout.kept_bytes,
            }
            for column, candidate in enumerate(space.candidates)
        ],
        "kept_bytes": layout.kept_bytes,
        "excluded": dict(layout.excluded),
        "units": [
            {
                "name": unit.name,
                "kind": unit.kind,
                "parameters": unit.parameters,
                "tensors": [matrix.name for matrix in unit.matrices],
            }
            for unit in space.units
        ],
        "cost": _cost(space),
    }


def _widest_uniform(space: Space, limit: int) -> str | None:
    """The largest candidate that fits everywhere; None if none does."""
    sizes = space.bytes.sum(axis=0) + space.layout.kept_bytes
    fitting = [column for column in range(len(space.candidates)) if sizes[column] <= limit]
    if not fitting:
        return None
    return space.candidates[max(fitting, key=lambda column: int(sizes[column]))].name


def _cost(space: Space) -> dict[str, Any]:
    """Rough seconds on this machine's CPU and gigabytes of a search with default settings."""
    import psutil

    windows = parse_windows(DEFAULT_WINDOWS)
    tokens = {purpose: count * DEFAULT_LENGTH for purpose, count in windows.items()}
    cores = psutil.cpu_count(logical=False) or 1
    pass_seconds = 2 * space.layout.parameters / (_CORE_FLOPS * cores)
    scored = len(space.units) * len(space.candidates)
    policies = 30
    return {
        "cores": cores,
        "tokens": tokens,
        "seconds_fisher_output": pass_seconds
        * (3 * tokens["calibration"] + 1024 * len(space.candidates)),
        "seconds_kl": pass_seconds * tokens["calibration"] * (0.5 * scored + 1),
        "seconds_check": pass_seconds
        * (policies * tokens["selection"] + policies // 2 * tokens["evaluation"]),
        # float32 weights, one policy's originals, and codes of the candidates.
        "memory_bytes": space.layout.parameters * (4 + 4 + len(space.candidates)),
    }
