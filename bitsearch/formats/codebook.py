"""Codes that name the entries of a table of the row's own: `lut3-row`, `lut4-row`, `lut2-row`.

The non-uniform format of SqueezeLLM (Kim et al., ICML 2024, section 4.1). Bytes, row by
row: codes, padded to a whole byte; 2^bits float16 entries.
"""

from __future__ import annotations

import re

from bitsearch.formats.base import Format

LUT_BITS = range(2, 5)
_NAME = re.compile(r"lut([2-4])-row")


class CodebookFormat(Format):
    """A table a row."""

    @property
    def name(self) -> str:
        return f"lut{self.bits}-row"

    @property
    def family(self) -> str:
        return "lut-row"

    def bytes(self, out_features: int, in_features: int) -> int:
        table = 2 << self.bits
        return out_features * (-(-in_features * self.bits // 8) + table)


def parse(name: str) -> CodebookFormat | None:
    """Read a name; None if it is of another family."""
    match = _NAME.fullmatch(name)
    return CodebookFormat("lut", int(match[1])) if match else None
