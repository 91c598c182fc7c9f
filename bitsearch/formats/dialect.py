"""`dialect4-b32`: blocks of 32 four-bit weights, each block in one of sixteen dialects.

BlockDialect (Jang and Tambe, ICML 2025, section 3): a weight is a sign and the index
of one of eight magnitudes; dialects differ in the largest two, so that a block finds
one that fits its largest value. 9 bits a block name the dialect (4) and the shared
exponent (5): 4.28 bits a weight. Bytes: codes, then the 9 bits of each block, both
padded to a whole byte in each row.
"""

from __future__ import annotations

from bitsearch.formats.base import Format

BLOCK = 32
HEADER_BITS = 9
# Magnitudes in halves; largest first, in pairs with the same largest value.
_LAST_TWO = (
    (11, 15), (9, 15), (11, 14), (9, 14), (10, 13), (8, 13), (10, 12), (8, 12),
    (9, 11), (7, 11), (9, 10), (7, 10), (8, 9), (7, 9), (7, 8),
)  # fmt: skip
DIALECTS: tuple[tuple[int, ...], ...] = (
    *((0, 1, 2, 3, 4, 6, *last) for last in _LAST_TWO),
    (0, 1, 2, 3, 4, 5, 6, 8),
)


class DialectFormat(Format):
    """The one format of this family."""

    @property
    def name(self) -> str:
        return "dialect4-b32"

    @property
    def family(self) -> str:
        return "dialect"

    def bytes(self, out_features: int, in_features: int) -> int:
        codes = -(-in_features * self.bits // 8)
        return out_features * (codes + -(-self.groups(in_features) * HEADER_BITS // 8))


DIALECT4 = DialectFormat("dialect4", 4, BLOCK)


def parse(name: str) -> DialectFormat | None:
    """Read a name; None if it is of another family."""
    return DIALECT4 if name == DIALECT4.name else None
