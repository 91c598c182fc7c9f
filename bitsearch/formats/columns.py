"""Whole input columns in higher precision: `int3-g128+fp16x16`, `int4-g128-sym+int8x3%`.

`+fp16x16` keeps 16 columns of each matrix in float16 (OWQ: Lee et al., AAAI 2024, section
3; QUIK: Ashkboos et al., EMNLP 2024, section 3; the weights of LLM.int8(): Dettmers et
al., NeurIPS 2022, section 3.2), `+int8x128` keeps 128 as symmetric 8-bit integers (Atom:
Zhao et al., MLSys 2024, section 4.1). `x1%` is a share of the columns, rounded up.

Bytes: 2 for the index of each kept column; the kept columns, in float16 or as `int8-row-sym`;
the others, closed up, in the base format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitsearch.formats.base import Format
from bitsearch.formats.integer import IntFormat
from bitsearch.formats.sixteen import FP16
from bitsearch.formats.split import (
    MOST_COLUMNS,
    PERCENT,
    SplitFormat,
    parse_percent,
    percent,
    share_of,
)

KEPT = {"fp16": FP16, "int8": IntFormat("int", 8, None, True)}
_NAME = re.compile(rf"(?P<kept>fp16|int8)x(?:(?P<count>[1-9][0-9]{{0,4}})|(?P<share>{PERCENT}))")


@dataclass(frozen=True, kw_only=True)
class ColumnsFormat(SplitFormat):
    """A base with some columns kept.

    Attributes:
        kept: the format of the kept columns.
        count: how many, or 0.
        share: how many in millionths of a row, if `count` is 0.
    """

    kept: Format
    count: int = 0
    share: int = 0

    @property
    def ending(self) -> str:
        kept = next(name for name, format in KEPT.items() if format == self.kept)
        return f"{kept}x{self.count or percent(self.share)}"

    def columns(self, in_features: int) -> int:
        """Kept columns of a row of `in_features` weights."""
        return self.count or share_of(self.share, in_features)

    def fits(self, in_features: int) -> bool:
        rest = in_features - self.columns(in_features)
        return in_features <= MOST_COLUMNS and rest > 0 and self.base.fits(rest)

    def bytes(self, out_features: int, in_features: int) -> int:
        columns = min(self.columns(in_features), in_features)
        kept = self.kept.bytes(out_features, columns)
        return 2 * columns + kept + self.base.bytes(out_features, in_features - columns)


def parse(base: Format, ending: str) -> ColumnsFormat | None:
    """Read what follows the base; None if it is of another family."""
    match = _NAME.fullmatch(ending)
    share = parse_percent(match["share"]) if match and match["share"] else 0
    if match is None or share is None:
        return None
    return ColumnsFormat(
        "columns",
        base.bits,
        base.group_size,
        base.symmetric,
        base=base,
        kept=KEPT[match["kept"]],
        count=int(match["count"] or 0),
        share=share,
    )
