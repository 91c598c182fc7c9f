"""Budgets as users write them: 3.5bpw, 3.5bpw@linear, 600MB, 1.2GiB, 0.8x, 12ms@batch=1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.kernels.regime import Regime, parse_regime
from bitsearch.objectives.cost.latency import Latency
from bitsearch.space import Space

_BUDGET = re.compile(
    r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?P<unit>[A-Za-z]+)(?:@(?P<scope>.+))?"
)
_SIZES = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}
_TIMES = {"us": 1000, "ms": 1000**2, "s": 1000**3}
_DEFAULT_REGIME = "batch=1"


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on stored bytes, or on the time of a step.

    Attributes:
        text: as the user wrote it.
        linear_only: whether only linear layers of the blocks count.
        limit: bytes, of everything that the model stores unless `linear_only`; or
            nanoseconds of a step.
        regime: of the step; None of bytes.
    """

    text: str
    linear_only: bool
    limit: int
    regime: Regime | None = None


def is_time(text: str) -> bool:
    """Whether a budget is one of time, as far as its unit tells."""
    match = _BUDGET.fullmatch(text.strip())
    return match is not None and match["unit"] in _TIMES


def parse_budget(text: str, space: Space) -> Budget:
    """Read a budget for a space; bits and factors are rounded down to whole bytes.

    Raises:
        UsageError: the text is no budget.
    """
    match = _BUDGET.fullmatch(text.strip())
    unit = match["unit"] if match else ""
    if match is None:
        raise _not_a_budget(text)
    number, scope = Fraction(match["number"]), match["scope"]
    if unit in _TIMES:
        regime = parse_regime(scope or _DEFAULT_REGIME)
        return Budget(text, False, int(number * _TIMES[unit]), regime)
    if scope is not None and (scope, unit) != ("linear", "bpw"):
        raise _not_a_budget(text)
    if unit == "bpw":
        linear = scope is not None
        counted = [
            u.parameters
            for u, is_linear in zip(space.units, space.linear, strict=True)
            if is_linear
        ]
        parameters = sum(counted) if linear else space.layout.parameters
        return Budget(text, linear, int(number * parameters / 8))
    if unit == "x":
        return Budget(text, False, int(number * 2 * space.layout.parameters))
    if unit in _SIZES:
        return Budget(text, False, int(number * _SIZES[unit]))
    raise _not_a_budget(text)


def check_feasible(
    budgets: Sequence[Budget], space: Space, times: Mapping[Regime, Latency] | None = None
) -> None:
    """Refuse a budget that no policy keeps, or that exceeds what any policy needs.

    Args:
        budgets: to keep together.
        space: whose policies; of those with a kernel alone, if a budget is a time.
        times: of each regime that a budget names.

    Raises:
        InfeasibleBudget: outside of the achievable range; the message holds it.
    """
    for budget in budgets:
        if budget.regime is not None:
            _check_time(budget, space, (times or {})[budget.regime])
            continue
        scope = space.linear if budget.linear_only else None
        low, high = space.byte_range(scope)
        parameters = (
            sum(u.parameters for u, s in zip(space.units, space.linear, strict=True) if s)
            if budget.linear_only
            else space.layout.parameters
        )
        # Both ends as printed, rounded up to a thousandth of a bit, are accepted.
        least, most = (_up(8 * end, parameters) for end in (low, high))
        if low <= budget.limit <= max(high, int(most * parameters / 8)):
            continue
        side = "below" if budget.limit < low else "above"
        raise InfeasibleBudget(
            f"budget {budget.text} ({budget.limit:,} bytes) is {side} the achievable range: "
            f"{low:,} to {high:,} bytes, {float(least):.3f} to {float(most):.3f} "
            f"bpw{'@linear' if budget.linear_only else ''} with these candidates"
        )


def resources(
    budgets: Sequence[Budget], space: Space, times: Mapping[Regime, Latency] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Costs (budgets, units, candidates) and limits (budgets,) for a solver.

    Bytes and nanoseconds that no choice changes are taken off the limits.
    """
    costs, limits = [], []
    for budget in budgets:
        if budget.regime is not None:
            found = (times or {})[budget.regime]
            costs.append(found.nanoseconds)
            limits.append(budget.limit - found.rest)
        elif budget.linear_only:
            costs.append(np.where(space.linear[:, None], space.bytes, 0))
            limits.append(budget.limit)
        else:
            costs.append(space.bytes)
            limits.append(budget.limit - space.kept_bytes)
    return np.stack(costs), np.array(limits, dtype=np.int64)


def _check_time(budget: Budget, space: Space, time: Latency) -> None:
    allowed = space.allowed & time.runs
    low = time.rest + int(np.where(allowed, time.nanoseconds, 2**62).min(axis=1).sum())
    high = time.rest + int(np.where(allowed, time.nanoseconds, 0).max(axis=1).sum())
    # Both ends as printed, rounded up to a microsecond, are accepted.
    if low <= budget.limit <= max(high, -(-high // 1000) * 1000):
        return
    side = "below" if budget.limit < low else "above"
    raise InfeasibleBudget(
        f"budget {budget.text} ({budget.limit / 1e6:.3f} ms) is {side} the achievable range: "
        f"{-(-low // 1000) / 1000:.3f} to {-(-high // 1000) / 1000:.3f} ms a step at "
        f"{time.regime.text}, with these candidates on this device"
    )


def _up(bits: int, parameters: int) -> Fraction:
    """Bits a parameter, rounded up to three decimals."""
    return Fraction(-(-1000 * bits // max(1, parameters)), 1000)


def _not_a_budget(text: str) -> UsageError:
    return UsageError(
        f"'{text}' is not a budget; write 3.5bpw, 3.5bpw@linear, 600MB, 1.2GiB, 0.8x or "
        "12ms@batch=1"
    )
