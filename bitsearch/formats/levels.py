"""Formats whose codes name the entries of a fixed table, times one scale a group.

- `nf3-g64`, `nf4-g64`: NormalFloat, quantiles of the normal distribution
  (Dettmers et al., QLoRA, NeurIPS 2023, section 3 and appendix E); float16 scale.
- `fp8`, `fp8-e5m2`, `fp6`, `fp6-e2m3`, `fp4`: small floats with a float32 scale a
  row, or a group as in `fp8-g128`. Without more, `fp8` is E4M3 and `fp6` is E3M2.
- `mxfp4`, `mxfp6`, `mxfp6-e2m3`, `mxfp8`, `mxfp8-e5m2`, `mxint8`: blocks of 32 with a
  power-of-two scale in 8 bits (OCP Microscaling Formats v1.0, sections 5 and 6).
- `nvfp4`: blocks of 16 with an E4M3 scale, times a float32 scale of the matrix
  (NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, section 2).

Bytes: `bits` a weight, each row padded to a whole byte; the scales; nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from bitsearch.formats.base import Format, group_suffix

Scale = Literal["float16", "float32", "e8m0", "e4m3"]
SCALE_BYTES: Mapping[Scale, int] = {"float16": 2, "float32": 4, "e8m0": 1, "e4m3": 1}
_TENSOR_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Table:
    """The values that codes stand for, and how they are scaled.

    Attributes:
        bits: code bits.
        values: of every code, in units of the scale; NaN where a code is unused.
        scale: how the scale of a group is stored.
        block: the fixed group size; 0 where any may be chosen, a row by default.
        family: what formats of several widths share.
    """

    bits: int
    values: tuple[float, ...]
    scale: Scale
    block: int
    family: str


def minifloat(
    exponent: int, mantissa: int, *, reserved: Literal["none", "nan", "ieee"]
) -> tuple[float, ...]:
    """Values by bit pattern: sign, `exponent` bits, `mantissa` bits, bias 2^(exponent−1) − 1.

    Args:
        exponent: bits of the exponent.
        mantissa: bits of the mantissa.
        reserved: patterns that are no numbers: none, the largest alone (E4M3), or the
            largest exponent (E5M2).
    """
    bias = 2 ** (exponent - 1) - 1
    half = []
    for code in range(2 ** (exponent + mantissa)):
        power, fraction = divmod(code, 2**mantissa)
        top = power == 2**exponent - 1
        if (reserved == "ieee" and top) or (
            reserved == "nan" and top and fraction == 2**mantissa - 1
        ):
            half.append(math.nan)
        elif power == 0:
            half.append(math.ldexp(fraction, 1 - bias - mantissa))
        else:
            half.append(math.ldexp(2**mantissa + fraction, power - bias - mantissa))
    return (*half, *(-value for value in half))


def normal_float(bits: int) -> tuple[float, ...]:
    """Levels of NormalFloat: quantiles of N(0, 1), zero among them, scaled to [−1, 1].

    As published: one more level above zero than below, and the outermost at the
    quantile 1 − (1/32 + 1/30)/2 for four bits; other widths alike.
    """
    count = 2**bits
    offset = 1 - (1 / (2 * count) + 1 / (2 * count - 2)) / 2
    above, below = count // 2, count // 2 - 1

    def quantiles(number: int) -> list[float]:
        step = (offset - 0.5) / number
        return [NormalDist().inv_cdf(offset - step * index) for index in range(number)]

    high, low = quantiles(above), [-value for value in quantiles(below)]
    peak = max(high)
    return tuple(value / peak for value in sorted([*low, 0.0, *high]))


_E4M3 = minifloat(4, 3, reserved="nan")
_E5M2 = minifloat(5, 2, reserved="ieee")
_E3M2 = minifloat(3, 2, reserved="none")
_E2M3 = minifloat(2, 3, reserved="none")
_E2M1 = minifloat(2, 1, reserved="none")
_INT8 = tuple(math.nan if code == 128 else (code - 256 * (code > 128)) / 64 for code in range(256))

TABLES: Mapping[str, Table] = {
    "nf3": Table(3, normal_float(3), "float16", 0, "nf"),
    "nf4": Table(4, normal_float(4), "float16", 0, "nf"),
    "fp4": Table(4, _E2M1, "float32", 0, "fp"),
    "fp6": Table(6, _E3M2, "float32", 0, "fp"),
    "fp6-e2m3": Table(6, _E2M3, "float32", 0, "fp-e2m3"),
    "fp8": Table(8, _E4M3, "float32", 0, "fp"),
    "fp8-e5m2": Table(8, _E5M2, "float32", 0, "fp-e5m2"),
    "mxfp4": Table(4, _E2M1, "e8m0", 32, "mxfp"),
    "mxfp6": Table(6, _E3M2, "e8m0", 32, "mxfp"),
    "mxfp6-e2m3": Table(6, _E2M3, "e8m0", 32, "mxfp-e2m3"),
    "mxfp8": Table(8, _E4M3, "e8m0", 32, "mxfp"),
    "mxfp8-e5m2": Table(8, _E5M2, "e8m0", 32, "mxfp-e5m2"),
    "mxint8": Table(8, _INT8, "e8m0", 32, "mxint"),
    "nvfp4": Table(4, _E2M1, "e4m3", 16, "nvfp"),
}
_NAME = re.compile(r"(?P<kind>.+?)(?:-g(?P<group>[1-9][0-9]{0,8})|(?P<row>-row))?")


class LevelFormat(Format):
    """A table of levels with scales."""

    @property
    def table(self) -> Table:
        """What its codes stand for."""
        return TABLES[self.kind]

    @property
    def name(self) -> str:
        return self.kind if self._implied else f"{self.kind}-{group_suffix(self.group_size)}"

    @property
    def family(self) -> str:
        family = self.table.family
        return family if self._implied else f"{family}-{group_suffix(self.group_size)}"

    @property
    def _implied(self) -> bool:
        """Whether the name says nothing about groups."""
        return self.table.block > 0 or (self.group_size is None and self.table.scale == "float32")

    def bytes(self, out_features: int, in_features: int) -> int:
        scales = self.groups(in_features) * SCALE_BYTES[self.table.scale]
        whole = _TENSOR_SCALE_BYTES if self.table.scale == "e4m3" else 0
        return out_features * (-(-in_features * self.bits // 8) + scales) + whole


def parse(name: str) -> LevelFormat | None:
    """Read a name; None if it is of another family."""
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in TABLES:
        return None
    table = TABLES[match["kind"]]
    group = int(match["group"]) if match["group"] else None
    if table.block:
        group = table.block
    found = LevelFormat(match["kind"], table.bits, group)
    return found if found.name == name else None
