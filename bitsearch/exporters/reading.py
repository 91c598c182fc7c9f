"""Formats from the fields that GPTQ-like configurations share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.formats import BF16, Format
from bitsearch.formats.integer import INT_BITS, IntFormat


def read_integer(path: Path, fields: Mapping[str, Any]) -> Format:
    """The format of `bits`, `group_size` (−1 is a whole row) and `sym`; 16 bits are kept.

    Raises:
        BadInput: no format of ours.
    """
    bits, group = fields.get("bits"), fields.get("group_size", -1)
    if isinstance(bits, int) and bits >= 16:
        return BF16
    integer = str(fields.get("data_type") or "int").startswith("int")
    if (
        not integer
        or bits not in INT_BITS
        or not isinstance(group, int)
        or (group < 1 and group != -1)
    ):
        raise BadInput(
            f"{path}: no format of ours is {bits}-bit {fields.get('data_type', 'int')} in groups "
            f"of {group}"
        )
    return IntFormat("int", int(bits or 0), group if group > 0 else None, bool(fields.get("sym")))
