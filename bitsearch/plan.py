"""What a search would do, from the configuration alone: range, size, time, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitsearch.budget import check_feasible, parse_budget
from bitsearch.errors import UsageError
from bitsearch.formats import parse_formats
from bitsearch.models.load import open_layout
from bitsearch.preparations import load_method
from bitsearch.settings import (
    DEFAULT_CANDIDATES,
    DEFAULT_LENGTH,
    DEFAULT_WINDOWS,
    parse_windows,
    refuse_unfused,
)
from bitsearch.space import Space, make_space
from bitsearch.targets import DEFAULT_TARGET, load_target

# Multiplications a second that a forward pass reaches on one core in float32; the
# estimate of time is stated with it.
_CORE_FLOPS = 4e10


def make_plan(
    model: str,
    budgets: Sequence[str],
    *,
    candidates: str | None,
    frozen: Mapping[str, str],
    fuse: bool,
    revision: str | None,
    target: str | None = None,
    prepare: str | None = None,
) -> dict[str, Any]:
    """Feasible range, units, candidate sizes, and the cost of a default search.

    Raises:
        InfeasibleBudget: a budget is outside of the achievable range.
        UsageError: no such target or preparation, or it does not run what is asked for.
    """
    target = target or DEFAULT_TARGET
    refuse_unfused(target, fuse)
    untie = prepare is not None and load_method(prepare).unties
    layout, _, _ = open_layout(model, revision=revision, fuse=fuse, untie=untie)
    profile = load_target(target)
    formats = parse_formats(candidates or profile.candidates or DEFAULT_CANDIDATES)
    space = make_space(layout, formats, frozen, profile)
    parsed = [parse_budget(text, space) for text in budgets]
    for budget in parsed:
        if budget.regime is not None:
            raise UsageError(
                f"budget {budget.text} is a time, which depends on the machine: plan tells bytes; "
                "see `bitsearch profile`, and search with this budget"
            )
    check_feasible(parsed, space)
    low, high = space.byte_range()
    parameters = layout.parameters
    return {
        "model": model,
        "target": target,
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
                "bytes": _everywhere(space, column),
                "units": int(space.allowed[:, column].sum()),
            }
            for column, candidate in enumerate(space.candidates)
        ],
        "kept_bytes": space.kept_bytes,
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
    sizes = {column: _everywhere(space, column) for column in range(len(space.candidates))}
    fitting = [column for column, size in sizes.items() if size <= limit]
    return space.candidates[max(fitting, key=sizes.__getitem__)].name if fitting else None


def _everywhere(space: Space, column: int) -> int:
    """Bytes of a candidate everywhere; where it is not offered, of the next larger one."""
    total = space.kept_bytes
    for sizes, allowed in zip(space.bytes, space.allowed, strict=True):
        offered = sorted(int(size) for size in sizes[allowed])
        size = int(sizes[column])
        total += size if allowed[column] else next((b for b in offered if b >= size), offered[-1])
    return total


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
