"""Integers whose scales and zero points are themselves in few bits: `int3-g16-s3`.

The two levels of SpQR (Dettmers et al., ICLR 2024, section 4): a weight is s (q − z), and
the scales s of 16 groups in a row are affine integers with a float16 scale and bias of
their own, as are the zero points z, which are no whole numbers. `int3-g16-s3` takes 3.625
bits a weight, where `int3-g16` takes 4.1875.

Bytes, row by row: codes, padded to a whole byte; scales and zero points, each in the layout
of `intS-g16-fz` (`bitsearch.formats.affine`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitsearch.formats.affine import AffineFormat
from bitsearch.formats.base import Format

STATISTICS_GROUP = 16
_NAME = re.compile(r"int(?P<bits>[2-8])-g(?P<group>[1-9][0-9]{0,8})-s(?P<statistics>[2-8])")


@dataclass(frozen=True, kw_only=True)
class BilevelFormat(Format):
    """An integer format with quantized scales and zero points.

    Attributes:
        statistics: the format of the (out, groups) scales, and of the zero points.
    """

    statistics: AffineFormat

    @property
    def name(self) -> str:
        return f"int{self.bits}-{self.family}"

    @property
    def family(self) -> str:
        return f"g{self.group_size}-s{self.statistics.bits}"

    def bytes(self, out_features: int, in_features: int) -> int:
        statistics = self.statistics.bytes(out_features, self.groups(in_features))
        return out_features * -(-in_features * self.bits // 8) + 2 * statistics


def parse(name: str) -> BilevelFormat | None:
    """Read a name; None if it is of another family."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    statistics = AffineFormat("affine", int(match["statistics"]), STATISTICS_GROUP, False)
    return BilevelFormat(
        "bilevel", int(match["bits"]), int(match["group"]), False, statistics=statistics
    )
