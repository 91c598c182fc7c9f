"""Candidate formats: parse, print, and the exact bytes of any shape.

A format is written as it appears in a policy: `int4-g128`, `int3-g64-sym`, `nf4-g64`,
`fp8`, `mxfp4`, `nvfp4`, `gguf-q4_k`, `bf16`. Each family is one file here, and one in
`bitsearch.quantizers` that rounds weights into it. Bytes are those of bitsearch's own
packed layout, which the file describes. A format in two parts is another one, a plus
sign and what is kept apart: `int3-g128+fp16x16`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

from bitsearch.errors import UsageError
from bitsearch.formats import (
    affine,
    bilevel,
    codebook,
    columns,
    dialect,
    gguf,
    integer,
    levels,
    sixteen,
    sparse,
)
from bitsearch.formats.base import Format
from bitsearch.formats.sixteen import BF16, FP16

_BASES = (integer.parse, affine.parse, bilevel.parse, levels.parse, dialect.parse, codebook.parse)
_OTHERS = (sixteen.parse, gguf.parse)
_SPLITS = (columns.parse, sparse.parse)


def parse_format(name: str) -> Format:
    """Read a format from its short form.

    Raises:
        UsageError: the name is not one of a known format.
    """
    base, plus, ending = name.partition("+")
    found = _first(_BASES if plus else (*_BASES, *_OTHERS), base)
    if found is not None and plus:
        found = _first([partial(parse, found) for parse in _SPLITS], ending)
    if found is not None:
        return found
    raise UsageError(
        f"unknown format '{name}': write int2..int8 with a group size, such as int4-g128, "
        "int3-g64-sym or int8-row, bf16 or fp16; or see `bitsearch list formats`"
    )


def _first(parsers: Iterable[Callable[[str], Format | None]], text: str) -> Format | None:
    """What the first parser reads that can."""
    return next((found for parse in parsers if (found := parse(text)) is not None), None)


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


__all__ = ["BF16", "FP16", "Format", "parse_format", "parse_formats"]
