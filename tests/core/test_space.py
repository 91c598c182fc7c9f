"""What may be chosen, and what it weighs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitsearch.errors import UsageError
from bitsearch.formats import parse_format, parse_formats
from bitsearch.space import Space, make_space, unit_bytes
from bitsearch.units import ModelLayout


def test_everything_is_allowed_unless_frozen(layout: ModelLayout) -> None:
    space = make_space(layout, parse_formats("int4-g32,bf16"))
    assert space.allowed.all() and space.allowed.shape == (len(layout.units), 2)


def test_frozen_units_take_their_one_format(layout: ModelLayout) -> None:
    space = make_space(
        layout,
        parse_formats("int3-g32,int4-g32"),
        {"embed": "int8-row", "blocks.?.o": "int4-g32"},
    )
    assert [c.name for c in space.candidates] == ["int3-g32", "int4-g32", "int8-row"]
    by_name = dict(zip([u.name for u in space.units], space.allowed.tolist(), strict=True))
    assert by_name["embed"] == [False, False, True]
    assert by_name["blocks.0.o"] == by_name["blocks.1.o"] == [False, True, False]
    # the extra format is for frozen units alone
    assert by_name["blocks.0.qkv"] == [True, True, False]


def test_the_last_matching_pattern_counts(layout: ModelLayout) -> None:
    space = make_space(
        layout,
        parse_formats("int3-g32,int4-g32,bf16"),
        {"blocks.*": "int3-g32", "blocks.1.*": "bf16"},
    )
    taken = {u.name: int(a.argmax()) for u, a in zip(space.units, space.allowed, strict=True)}
    assert taken["blocks.0.o"] == 0 and taken["blocks.1.o"] == 2
    assert space.allowed[0].all()


@pytest.mark.parametrize("pattern", ["layers.*", "BLOCKS.*", "embed.weight", ""])
def test_a_pattern_that_matches_nothing_is_refused(layout: ModelLayout, pattern: str) -> None:
    with pytest.raises(UsageError, match="matches no unit; see `bitsearch plan --units`"):
        make_space(layout, parse_formats("int4-g32"), {pattern: "bf16"})


def test_an_unknown_frozen_format_is_refused(layout: ModelLayout) -> None:
    with pytest.raises(UsageError, match="unknown format 'int4'"):
        make_space(layout, parse_formats("int4-g32"), {"embed": "int4"})


def test_bytes_count_every_expert_and_every_member(space: Space) -> None:
    units = {unit.name: unit for unit in space.units}
    format = parse_format("int4-g32")
    # 48 columns: 24 bytes of codes, two scales, a byte with two zero points
    row = 24 + 2 * 2 + 1
    assert unit_bytes(units["blocks.0.qkv"], format) == (48 + 20 + 20) * row
    # 30 columns: one short group
    assert unit_bytes(units["blocks.0.experts"], format) == 3 * (30 * row + 48 * (15 + 2 + 1))
    column = [c.name for c in space.candidates].index("int4-g32")
    assert [int(b) for b in space.bytes[:, column]] == [unit_bytes(u, format) for u in space.units]


def test_a_tied_tensor_is_counted_once(layouts: Callable[..., ModelLayout]) -> None:
    formats = parse_formats("bf16")
    tied, untied = (make_space(layouts(tied=tied), formats) for tied in (True, False))
    embedding = 2 * 200 * 48
    assert untied.byte_range()[0] - tied.byte_range()[0] == embedding
    # at 16 bits a model takes two bytes a parameter, norms and routers included
    for space in (tied, untied):
        assert space.byte_range() == (2 * space.layout.parameters,) * 2


def test_range_is_that_of_the_extreme_choices(layout: ModelLayout) -> None:
    space = make_space(layout, parse_formats("int2-g32,int8-g32,bf16"), {"embed": "int4-row"})
    low, high = space.byte_range()
    least = np.where(space.allowed, space.bytes, 10**12).argmin(axis=1)
    most = np.where(space.allowed, space.bytes, -1).argmax(axis=1)
    assert (space.total_bytes(least), space.total_bytes(most)) == (low, high)
    low_linear, high_linear = space.byte_range(space.linear)
    embed = unit_bytes(layout.units[0], parse_format("int4-row"))
    kept = layout.kept_bytes
    assert (low - low_linear, high - high_linear) == (embed + kept, embed + kept)


def test_linear_units_are_those_of_the_blocks(layouts: Callable[..., ModelLayout]) -> None:
    space = make_space(layouts(tied=False), parse_formats("bf16"))
    outside = [u.name for u, is_in in zip(space.units, space.linear, strict=True) if not is_in]
    assert outside == ["embed", "head"]


def test_assignment_pairs_units_with_their_formats(space: Space) -> None:
    choice = np.arange(len(space.units)) % len(space.candidates)
    pairs = space.assignment(choice)
    assert [u for u, _ in pairs] == list(space.units)
    assert [f for _, f in pairs] == [space.candidates[c] for c in choice]


def test_formats_of_whole_blocks_are_kept_off_other_rows(layout: ModelLayout) -> None:
    space = make_space(layout, parse_formats("gguf-q4_k,gguf-q8_0,bf16"))
    for unit, allowed in zip(space.units, space.allowed, strict=True):
        widths = [matrix.in_features for matrix in unit.matrices]
        assert allowed[0] == all(width % 256 == 0 for width in widths)
        assert allowed[1] == all(width % 32 == 0 for width in widths)
    assert not space.allowed.all() and space.allowed[:, 2].all()


def test_a_unit_that_nothing_can_store_is_named(layout: ModelLayout) -> None:
    with pytest.raises(UsageError, match=r"rows of \d+ weights.*bf16"):
        make_space(layout, parse_formats("gguf-q4_k"))
