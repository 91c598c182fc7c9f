"""Windows of text: disjoint, evenly spread, and refused when they cannot be trusted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsearch.corpora import PURPOSES, TextPlan, load_corpora, make_corpus, read_text
from bitsearch.errors import BadInput, UsageError

TokenizerOf = Callable[..., Any]
WINDOWS = {"calibration": 3, "selection": 2, "evaluation": 4}


def counting(words: int, start: int = 2) -> str:
    """A text whose tokens are start, start+1, …: windows show where they come from."""
    return " ".join(f"w{number}" for number in range(start, start + words))


def lines(count: int, seed: int = 0, words: int = 30) -> str:
    """Long lines of random words that hardly ever repeat."""
    rng = random.Random(seed)
    return "\n".join(
        " ".join(f"w{rng.randrange(2, 200)}" for _ in range(words)) for _ in range(count)
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a text file; its path."""

    def put(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return put


def plan(
    texts: Sequence[str] = (), own: dict[str, str] | None = None, length: int = 16
) -> TextPlan:
    """A plan of some small windows."""
    return TextPlan(tuple(texts), own or {}, length, dict(WINDOWS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    length=st.integers(2, 20),
    windows=st.integers(1, 8),
    spare=st.integers(0, 100),
    leading=st.booleans(),
)
def test_windows_are_disjoint_and_evenly_spread(
    tokenizer_of: TokenizerOf, length: int, windows: int, spare: int, leading: bool
) -> None:
    tokenizer = tokenizer_of(1000, leading=leading)
    body = length - leading
    words = windows * body + spare
    found = make_corpus("selection", [("t", counting(words))], tokenizer, length, windows, 1000)
    rows = found.tokens.tolist()
    assert len(found) == windows and found.tokens.shape == (windows, length)
    if leading:
        assert {row.pop(0) for row in rows} == {0}
    starts = [row[0] for row in rows]
    # consecutive words in each window, windows in order and apart
    assert all(row == list(range(row[0], row[0] + body)) for row in rows)
    steps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(step >= body for step in steps)
    assert not steps or max(steps) - min(steps) <= body
    # and no more is left over at the end than between windows
    assert words + 2 - rows[-1][-1] - 1 <= 2 * body + (max(steps) if steps else spare)


def test_a_leading_token_is_put_only_where_the_tokenizer_does(tokenizer_of: TokenizerOf) -> None:
    for leading in (True, False):
        tokenizer = tokenizer_of(leading=leading)
        found = make_corpus("selection", [("t", counting(100))], tokenizer, 8, 5, 200)
        assert [row[0] == 0 for row in found.tokens.tolist()] == [leading] * 5


def test_texts_share_the_windows(tokenizer_of: TokenizerOf) -> None:
    texts = [(name, counting(60, start)) for name, start in (("a", 2), ("b", 70), ("c", 130))]
    found = make_corpus("evaluation", texts, tokenizer_of(), 10, 7, 200)
    assert found.names == ("a", "a", "a", "b", "b", "c", "c")
    for name, row in zip(found.names, found.tokens.tolist(), strict=True):
        assert {"a": 2, "b": 70, "c": 130}[name] <= row[0] < {"a": 62, "b": 130, "c": 190}[name]


def test_the_hash_is_that_of_the_tokens(tokenizer_of: TokenizerOf) -> None:
    def digest(text: str, length: int = 8, windows: int = 4) -> str:
        return make_corpus("selection", [("t", text)], tokenizer_of(), length, windows, 200).sha256

    assert digest(counting(40)) == digest(counting(40).replace(" ", "\n"))
    assert len({digest(counting(40)), digest(counting(40, 3)), digest(counting(40), 4, 8)}) == 3


def test_parts_of_one_text_are_disjoint_and_in_order(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    file = write("t.txt", "\n".join(f"w{number}" for number in range(2, 200)))
    found = load_corpora(plan([file], length=8), tokenizer_of(), 200)
    ids = {purpose: found[purpose].tokens.flatten().tolist() for purpose in PURPOSES}
    assert max(ids["calibration"]) < min(ids["selection"])
    assert max(ids["selection"]) < min(ids["evaluation"])
    for purpose in PURPOSES:
        assert found[purpose].tokens.shape == (WINDOWS[purpose], 8)
        assert found[purpose].describe() == {
            "texts": [file],
            "windows": WINDOWS[purpose],
            "length": 8,
            "sha256": found[purpose].sha256,
        }


def test_a_text_of_its_own_is_used_whole(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    own = {
        purpose: write(f"{purpose}.txt", counting(64, 2 + 64 * index))
        for index, purpose in enumerate(PURPOSES)
    }
    found = load_corpora(plan(own=own), tokenizer_of(), 200)
    assert found["evaluation"].tokens.tolist() == [
        list(range(start, start + 16)) for start in (130, 146, 162, 178)
    ]


def test_a_text_of_its_own_replaces_the_common_one(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    common, own = write("common.txt", lines(40)), write("own.txt", lines(40, seed=1))
    found = load_corpora(plan([common], {"evaluation": own}), tokenizer_of(), 200)
    assert set(found["evaluation"].names) == {own}
    assert set(found["calibration"].names) == set(found["selection"].names) == {common}


def test_a_text_that_serves_two_purposes_is_refused(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    text = lines(40)
    own = {p: write(f"{p}.txt", lines(40, seed=i)) for i, p in enumerate(PURPOSES)}
    own["selection"] = write("copy.txt", "New first line.\n" + text)
    with pytest.raises(BadInput, match=r"calibration and selection texts share 40 long lines"):
        load_corpora(plan(own=own), tokenizer_of(), 200)


def test_a_repeated_line_or_two_is_no_overlap(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    licence = "w7 " * 40 + "\n"
    own = {p: write(f"{p}.txt", licence + lines(40, seed=i)) for i, p in enumerate(PURPOSES)}
    load_corpora(plan(own=own), tokenizer_of(), 200)


def test_a_short_text_is_refused_with_its_size(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of()
    make_corpus("selection", [("t", counting(64))], tokenizer, 16, 4, 200)
    with pytest.raises(BadInput, match=r"selection text 't' has 63 tokens, but 4 windows of 16"):
        make_corpus("selection", [("t", counting(63))], tokenizer, 16, 4, 200)
    # one endless line cannot be cut at line ends
    with pytest.raises(BadInput, match=r"text .* has 0 tokens"):
        load_corpora(plan([write("line.txt", counting(190))]), tokenizer, 200)


def test_a_tokenizer_of_another_model_is_refused(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(BadInput, match=r"gives id 101, but the model has 90 embedding rows"):
        make_corpus("selection", [("t", counting(100))], tokenizer_of(), 10, 10, 90)


def test_a_purpose_without_text_is_refused(
    write: Callable[[str, str], str], tokenizer_of: TokenizerOf
) -> None:
    own = {"calibration": write("c.txt", lines(40))}
    with pytest.raises(UsageError, match="no text for selection: give --text, or --selection-text"):
        load_corpora(plan(own=own), tokenizer_of(), 200)


def test_files_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    def refusal(reference: object) -> str:
        with pytest.raises(BadInput) as caught:
            read_text(str(reference))
        return str(caught.value)

    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\t\n")
    latin.write_bytes("naïve".encode("latin-1"))
    assert "is empty" in refusal(empty)
    assert "is not UTF-8 (byte 2)" in refusal(latin)
    missing = refusal(tmp_path / "missing.txt")
    assert missing.startswith("no text") and "calibration" in missing and "wiki" in missing
    assert refusal(tmp_path).startswith("no text")


def test_shipped_texts_are_disjoint(tokenizer_of: TokenizerOf) -> None:
    """The three texts beside the built-in model pass the check that users' texts must."""
    load_corpora(plan(own={purpose: purpose for purpose in PURPOSES}), tokenizer_of(), 200)
