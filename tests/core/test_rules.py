"""Rules of a user's own: what they forbid, tie and count."""

from __future__ import annotations

import pytest

from bitsearch.errors import UsageError
from bitsearch.formats import parse_formats
from bitsearch.rules import Rules
from bitsearch.space import Space, make_space
from bitsearch.units import ModelLayout


@pytest.fixture
def wide(layout: ModelLayout) -> Space:
    """Five widths for every unit."""
    return make_space(layout, parse_formats("int{2,3,4,8}-g32,bf16"))


def names(space: Space, unit: str) -> list[str]:
    """Formats that the unit of a name may take."""
    row = [u.name for u in space.units].index(unit)
    return [f.name for f, ok in zip(space.candidates, space.allowed[row], strict=True) if ok]


def test_at_least_forbids_fewer_bits_and_nothing_else(wide: Space) -> None:
    narrowed = Rules(at_least={"*.o": 4, "blocks.1.*": 8}).narrowed(wide)
    assert names(narrowed, "blocks.0.o") == ["int4-g32", "int8-g32", "bf16"]
    assert names(narrowed, "blocks.1.o") == names(narrowed, "blocks.1.qkv") == ["int8-g32", "bf16"]
    assert names(narrowed, "embed") == names(wide, "embed")
    assert narrowed.byte_range()[0] > wide.byte_range()[0]


def test_at_least_more_than_there_is(wide: Space) -> None:
    with pytest.raises(UsageError, match="--at-least embed=17 leaves no candidate for embed"):
        Rules(at_least={"embed": 17}).narrowed(wide)
    with pytest.raises(UsageError, match="--at-least pattern 'nobody' matches no unit"):
        Rules(at_least={"nobody": 4}).narrowed(wide)


def tied_names(space: Space, *patterns: str) -> list[set[str]]:
    """Names of the tied units."""
    return [{space.units[u].name for u in tie} for tie in Rules(tie=patterns).ties(space)]


def test_a_tie_of_each_block(wide: Space) -> None:
    blocks = [{f"blocks.{i}.{unit}" for unit in ("qkv", "o", "experts")} for i in range(2)]
    assert tied_names(wide, "blocks.{block}.*") == blocks
    assert tied_names(wide, "blocks.*") == [blocks[0] | blocks[1]]
    assert tied_names(wide, "*.o") == [{"blocks.0.o", "blocks.1.o"}]
    assert tied_names(wide, "embed") == []


def test_ties_that_share_a_unit_become_one(wide: Space) -> None:
    found = tied_names(wide, "blocks.0.[oq]*", "*.o", "*.experts")
    assert found[0] == {"blocks.0.o", "blocks.0.qkv", "blocks.1.o"}
    assert found[1] == {"blocks.0.experts", "blocks.1.experts"}


def test_ties_without_a_common_format_are_refused(layout: ModelLayout) -> None:
    frozen = make_space(layout, parse_formats("int4-g32,bf16"), {"blocks.0.o": "int8-row"})
    with pytest.raises(UsageError, match=r"tied units \(blocks.0.o, blocks.1.o\) allow no format"):
        Rules(tie=("*.o",)).ties(frozen)
    for pattern in ("nobody", "nobody.{block}.*"):
        with pytest.raises(UsageError, match="matches no unit"):
            Rules(tie=(pattern,)).ties(frozen)
