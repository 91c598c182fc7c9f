"""What a target refuses is never offered, and bytes are those of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format, parse_formats
from bitsearch.models.load import open_layout
from bitsearch.rules import Rules
from bitsearch.space import make_space
from bitsearch.targets import load_target, target_names
from bitsearch.units import ModelLayout

TINY = open_layout("tiny")[0]
FORMATS = "int{2,3,4,5,6,7,8}-g{32,48,64,128}{,-sym},int{4,8}-row{,-sym},nf4-g64,bf16"


@given(
    st.sampled_from(target_names()),
    st.sets(st.sampled_from(parse_formats(FORMATS)), min_size=3),
    st.integers(0, 2**32 - 1),
)
def test_no_choice_holds_what_the_target_refuses(name: str, formats: set[Any], seed: int) -> None:
    target = load_target(name)
    try:
        space = make_space(TINY, sorted(formats, key=lambda f: f.name), {}, target)
    except UsageError as error:
        # nothing but 16 bits would be left
        assert name in str(error) or "do not divide" in str(error)
        return
    rng = np.random.default_rng(seed)
    choice = np.array([rng.choice(np.flatnonzero(row)) for row in space.allowed])
    total = target.layout.kept * sum(TINY.kept.values())
    for unit, format in space.assignment(choice):
        assert target.unit_refusal(unit, TINY, format) == ""
        sizes = (target.layout.matrix(m.out_features, m.in_features, format) for m in unit.matrices)
        total += sum(sizes)
    assert space.total_bytes(choice) == total


@pytest.mark.parametrize(
    ("target", "kind", "shape", "format", "reason"),
    [
        ("vllm", "linear", (256, 256), "int4-g64", ""),
        ("vllm", "linear", (256, 256), "int3-g64", "does not run it; it runs int4"),
        ("vllm", "linear", (256, 256), "int8-g64", "does not run it"),
        ("vllm", "linear", (256, 256), "int8-g64-sym", ""),
        ("vllm", "linear", (256, 100), "int4-g64", "groups of 64 do not divide rows of 100"),
        ("vllm", "linear", (250, 256), "int4-g64", "multiples of 32 and 32, not 250 × 256"),
        ("vllm", "tied", (256, 256), "int4-g64", "in a tied embedding"),
        ("vllm", "tied", (256, 256), "bf16", ""),
        ("vllm-cpu", "linear", (256, 256), "int8-g64-sym", "does not run it"),
        ("transformers", "linear", (256, 256), "int4-g64", "does not run it"),
        ("none", "tied", (3, 5), "int3-g64", ""),
    ],
)
def test_refusals_say_why(
    target: str, kind: Any, shape: tuple[int, int], format: str, reason: str
) -> None:
    found = load_target(target).refusal(kind, *shape, parse_format(format))
    assert reason in found and bool(found) == bool(reason)


def test_a_unit_that_the_engine_cannot_quantize_stays_at_16_bits() -> None:
    space = make_space(TINY, parse_formats("int4-g64"), {}, load_target("vllm"))
    held = {u.name: [f.name for f, a in zip(space.candidates, row, strict=True) if a]
            for u, row in zip(space.units, space.allowed, strict=True)}  # fmt: skip
    assert held.pop("model.embed_tokens") == ["bf16"]
    assert all(formats == ["int4-g64"] for formats in held.values())


def test_only_candidates_that_run_somewhere_are_kept() -> None:
    formats = parse_formats("int{2,3,4,8}-g64,bf16")
    space = make_space(TINY, formats, {}, load_target("vllm"))
    assert [f.name for f in space.candidates] == ["int4-g64", "bf16"]
    with pytest.raises(UsageError, match=r"model\.layers\.5.* vllm does not run it"):
        make_space(TINY, parse_formats("int{2,3}-g64,bf16"), {}, load_target("vllm"))
    with pytest.raises(
        UsageError, match=r"--freeze model\.layers\.0\.mlp\.down_proj=int3-g64: vllm"
    ):
        frozen = {"model.layers.0.mlp.down_proj": "int3-g64"}
        make_space(TINY, formats, frozen, load_target("vllm"))


def test_portable_takes_whole_groups_where_they_exist(
    layouts: Callable[..., ModelLayout],
) -> None:
    layout = layouts(1, 192)
    formats = parse_formats("int4-g64,int4-g128,int3-g128,bf16")
    portable, free = (make_space(layout, formats, {}, load_target(n)) for n in ("portable", "none"))
    row = next(i for i, u in enumerate(layout.units) if u.name == "blocks.0.o")
    # no three-bit candidate has groups that divide 192
    assert portable.allowed[row].tolist() == [True, False, True, True]
    assert free.allowed.all()


def test_all_projections_of_experts_are_tied_where_they_are_stored_together(
    layouts: Callable[..., ModelLayout],
) -> None:
    layout = layouts(2)
    experts = [i for i, unit in enumerate(layout.units) if unit.kind == "experts"]
    assert load_target("portable").ties(layout) == ()
    unfused = ModelLayout(
        **{
            **{name: getattr(layout, name) for name in layout.__slots__},
            "units": tuple(
                type(u)(m.name, u.kind, (m,), u.block) for u in layout.units for m in u.matrices
            ),
        }
    )
    space = make_space(unfused, parse_formats("bf16"), {}, load_target("vllm"))
    ties = Rules().ties(space)
    names = [sorted(unfused.units[i].name for i in tie) for tie in ties]
    assert names == [
        [f"blocks.{block}.experts.{name}" for name in ("down", "up")]
        for block in range(len(experts))
    ]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'title = "mine"\nsource = "read"\nstored = "gptq"\n[[runs]]\nformats = "int4-g32-sym"\n'
    )
    target = load_target(str(path))
    assert target.refusal("linear", 64, 64, parse_format("int4-g32-sym")) == ""
    # 8 words of codes and 4 of zero points a group, 16-bit scales, 32-bit group indices
    assert target.layout.matrix(64, 64, parse_format("int4-g32-sym")) == (
        64 * 64 // 2 + 2 * 64 // 2 + 2 * 2 * 64 + 4 * 64
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('title = "x"', "source: Field required"),
        ('title = "x"\nsource = "y"\nstored = "zip"', "'zip' is none of packed"),
        ('title = "x"\nsource = "y"\n[[runs]]\nformats = "int9-g64"', "unknown format 'int9-g64'"),
        ("title =", "is no TOML"),
        ('title = "x"\nsource = "y"\ncolour = 1', "colour"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        load_target(str(path))


def test_unknown_targets_are_told() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'vlm'; known: .*portable"):
        load_target("vlm")
    with pytest.raises(BadInput, match="cannot be read"):
        load_target("nowhere.toml")
