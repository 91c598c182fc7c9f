"""Budgets as users write them: 3.5bpw, 3.5bpw@linear, 600MB, 1.2GiB, 0.8x."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.space import Space

_BUDGET = re.compile(
    r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?P<unit>[A-Za-z]+)(?P<scope>@linear)?"
)
_SIZES = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on stored bytes.

    Attributes:
        text: as the user wrote it.
        linear_only: whether only linear layers of the blocks count.
        limit: bytes; everything that the model stores, unless `linear_only`.
    """

    text: str
    linear_only: bool
    limit: int


def parse_budget(text: str, space: Space) -> Budget:
    """Read a budget for a space; bits and factors are rounded down to whole bytes.

    Raises:
        UsageError: the text is no budget.
    """
    match = _BUDGET.fullmatch(text.strip())
    unit = match["unit"] if match else ""
    if match is None or (match["scope"] and unit != "bpw"):
        raise _not_a_budget(text)
    number = Fraction(match["number"])
    if unit == "bpw":
        linear = match["scope"] is not None
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


def check_feasible(budgets: Sequence[Budget], space: Space) -> None:
    """Refuse a budget that no policy keeps, or that exceeds what any policy needs.

    Raises:
        InfeasibleBudget: outside of the achievable range; the message holds it.
    """
    for budget in budgets:
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
    budgets: Sequence[Budget], space: Space
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Costs (budgets, units, candidates) and limits (budgets,) for a solver.

    Bytes that no choice changes are taken off the limits.
    """
    costs, limits = [], []
    for budget in budgets:
        if budget.linear_only:
            costs.append(np.where(space.linear[:, None], space.bytes, 0))
            limits.append(budget.limit)
        else:
            costs.append(space.bytes)
            limits.append(budget.limit - space.kept_bytes)
    return np.stack(costs), np.array(limits, dtype=np.int64)


def _up(bits: int, parameters: int) -> Fraction:
    """Bits a parameter, rounded up to three decimals."""
    return Fraction(-(-1000 * bits // max(1, parameters)), 1000)


def _not_a_budget(text: str) -> UsageError:
    return UsageError(
        f"'{text}' is not a budget; write 3.5bpw, 3.5bpw@linear, 600MB, 1.2GiB or 0.8x"
    )
