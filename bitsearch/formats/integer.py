"""Integers of 2 to 8 bits with a float16 scale a group, and a zero point if asymmetric.

`int4-g128` (asymmetric), `int3-g64-sym`, `int8-row`. Bytes, row by row:

- codes: `bits` per weight, each row padded to a whole byte;
- scales: one float16 per group, the last group of a row may be shorter;
- zero points (asymmetric only): `bits` per group, each row padded to a byte.
"""

from __future__ import annotations

import re

from bitsearch.formats.base import Format, group_suffix

INT_BITS = range(2, 9)
_NAME = re.compile(r"int(?P<bits>[2-8])-(?:g(?P<group>[1-9][0-9]{0,8})|row)(?P<sym>-sym)?")


class IntFormat(Format):
    """An integer format."""

    @property
    def name(self) -> str:
        return f"int{self.bits}-{self.family}"

    @property
    def family(self) -> str:
        return f"{group_suffix(self.group_size)}{'-sym' if self.symmetric else ''}"

    def bytes(self, out_features: int, in_features: int) -> int:
        groups = self.groups(in_features)
        row = -(-in_features * self.bits // 8) + 2 * groups
        if not self.symmetric:
            row += -(-groups * self.bits // 8)
        return out_features * row


def parse(name: str) -> IntFormat | None:
    """Read a name; None if it is of another family."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    group = int(match["group"]) if match["group"] else None
    return IntFormat("int", int(match["bits"]), group, bool(match["sym"]))
