"""What formats in two parts share: a base, and an ending that says what is kept apart.

Shares are of the whole, in per cent with up to four decimals, and round up to whole
things, so that bytes follow from the shape alone.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass

from bitsearch.formats.base import Format

MOST_COLUMNS = 1 << 16  # a column's index is stored in 16 bits
WHOLE = 1_000_000
PERCENT = r"(?:0|[1-9][0-9]?)(?:\.[0-9]{0,3}[1-9])?%"


@dataclass(frozen=True, kw_only=True)
class SplitFormat(Format):
    """A format in two parts.

    `bits`, `group_size` and `symmetric` are those of the base.

    Attributes:
        base: the format of what is not kept apart.
    """

    base: Format

    @property
    @abstractmethod
    def ending(self) -> str:
        """What the name adds to that of the base, after a plus sign."""

    @property
    def name(self) -> str:
        return f"{self.base.name}+{self.ending}"

    @property
    def family(self) -> str:
        return f"{self.base.family}+{self.ending}"


def parse_percent(text: str) -> int | None:
    """`0.45%` -> 4500 millionths; None if it is no share above 0 as this file writes them."""
    if not re.fullmatch(PERCENT, text):
        return None
    whole, _, decimals = text[:-1].partition(".")
    return int(whole + decimals.ljust(4, "0")) or None


def percent(millionths: int) -> str:
    """The inverse of `parse_percent`."""
    return f"{millionths / 10_000:.4f}".rstrip("0").rstrip(".") + "%"


def share_of(millionths: int, count: int) -> int:
    """That share of `count` things, rounded up."""
    return -(-millionths * count // WHOLE)
