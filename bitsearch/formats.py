"""Candidate formats: parse, print, and the exact bytes of any shape.

A format is written as it appears in a policy: `int4-g128` (asymmetric),
`int3-g64-sym`, `int8-row`, `bf16`, `fp16`. Bytes are those of bitsearch's own
packed layout, row by row:

- codes: `bits` per weight, each row padded to a whole byte;
- scales: one float16 per group, the last group of a row may be shorter;
- zero points (asymmetric only): `bits` per group, each row padded to a byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bitsearch.errors import UsageError

Kind = Literal["int", "bf16", "fp16"]

INT_BITS = range(2, 9)
_INT_NAME = re.compile(r"int(?P<bits>[2-8])-(?:g(?P<group>[1-9][0-9]{0,8})|row)(?P<sym>-sym)?")


@dataclass(frozen=True, slots=True)
class Format:
    """A numeric format.

    Attributes:
        kind: `int`, or the 16-bit float that keeps the weights as they are.
        bits: code bits of one weight.
        group_size: input columns sharing one scale; None for a whole row.
        symmetric: no zero point is stored.
    """

    kind: Kind
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def name(self) -> str:
        """The short form, e.g. `int4-g128`."""
        if self.kind != "int":
            return self.kind
        group = "row" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}-{group}{'-sym' if self.symmetric else ''}"

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    def bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of an (out_features, in_features) matrix, metadata included."""
        if self.kind != "int":
            return 2 * out_features * in_features
        groups = self.groups(in_features)
        row = -(-in_features * self.bits // 8) + 2 * groups
        if not self.symmetric:
            row += -(-groups * self.bits // 8)
        return out_features * row


BF16 = Format("bf16", 16)
FP16 = Format("fp16", 16)


def parse_format(name: str) -> Format:
    """Read a format from its short form.

    Raises:
        UsageError: the name is not one of a known format.
    """
    if name in ("bf16", "fp16"):
        return BF16 if name == "bf16" else FP16
    if match := _INT_NAME.fullmatch(name):
        group = int(match["group"]) if match["group"] else None
        return Format("int", int(match["bits"]), group, bool(match["sym"]))
    raise UsageError(
        f"unknown format '{name}': write int2..int8 with a group size, such as "
        "int4-g128, int3-g64-sym or int8-row, or bf16 or fp16"
    )


def parse_formats(text: str) -> tuple[Format, ...]:
    """Read a comma-separated list; `int{3,4,5}-g64` and `int3..8-g64` expand.

    Raises:
        UsageError: a name is unknown or given twice.
    """
    # Commas inside braces do not separate.
    parts = [part.strip() for part in re.split(r",(?![^{}]*\})", text)]
    formats = tuple(parse_format(name) for part in parts if part for name in _expand(part))
    if not formats:
        raise UsageError("no candidate format given, such as int3..8-g64,bf16")
    if len(set(formats)) != len(formats):
        raise UsageError(f"a candidate format is given twice in '{text}'")
    return formats


def _expand(name: str) -> list[str]:
    """The names that braces and a range of widths stand for."""
    if braces := re.fullmatch(r"([^{}]*)\{([^{}]*)\}(.*)", name):
        choices = braces[2].split(",")
        return [
            expanded
            for choice in choices
            for expanded in _expand(f"{braces[1]}{choice.strip()}{braces[3]}")
        ]
    span = re.fullmatch(r"int([2-8])\.\.([2-8])(-.*)", name)
    if span and span[1] <= span[2]:
        return [f"int{bits}{span[3]}" for bits in range(int(span[1]), int(span[2]) + 1)]
    return [name]
