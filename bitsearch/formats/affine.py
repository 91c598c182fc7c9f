"""Integers of 2 to 8 bits with a float16 scale and a float16 bias a group: `int4-g64-fz`.

A weight is scale · code + bias: the zero point −bias / scale need not be a whole number
(`fz`: float zero). HQQ's format, and the affine layout of MLX, whose scales and biases
are these. Bytes, row by row: codes, padded to a whole byte; scales; biases.
"""

from __future__ import annotations

import re

from bitsearch.formats.base import Format, group_suffix

_NAME = re.compile(r"int(?P<bits>[2-8])-(?:g(?P<group>[1-9][0-9]{0,8})|row)-fz")


class AffineFormat(Format):
    """An integer format with a float zero point."""

    @property
    def name(self) -> str:
        return f"int{self.bits}-{self.family}"

    @property
    def family(self) -> str:
        return f"{group_suffix(self.group_size)}-fz"

    def bytes(self, out_features: int, in_features: int) -> int:
        row = -(-in_features * self.bits // 8) + 4 * self.groups(in_features)
        return out_features * row


def parse(name: str) -> AffineFormat | None:
    """Read a name; None if it is of another family."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    group = int(match["group"]) if match["group"] else None
    return AffineFormat("affine", int(match["bits"]), group, False)
