"""Built-in texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitsearch.errors import BadInput
from bitsearch.texts import TEXTS, builtin_text


def test_unknown_text_lists_those_known() -> None:
    with pytest.raises(BadInput, match=r"'wikki'; there are: wiki, c4"):
        builtin_text("wikki")


def test_text_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("BITSEARCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BadInput, match="pip cannot download"):
        builtin_text("wiki")


def test_shipped_texts_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("BITSEARCH_CACHE", str(tmp_path))
    shipped = [name for name, about in TEXTS.items() if "shipped" in about]
    assert shipped
    assert all(len(builtin_text(name)) > 1000 for name in shipped)


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "characters", "beginning"),
    [
        ("wiki", 1_837_369, "2007 European Parliament election in Romania\n\nRomania elected"),
        ("c4", 1_328_115, "Restore from larger disk"),
        ("code", 1_345_810, "          move.w    #$0100,d0\n"),
        ("technical", 348_978, "MIT License"),
        ("stories", 261_057, "One day, a little girl named Lily"),
    ],
)
def test_fetched_texts(name: str, characters: int, beginning: str) -> None:
    text = builtin_text(name)
    assert len(text) == characters
    assert text.startswith(beginning)


@pytest.mark.network
def test_article_marks_are_stripped() -> None:
    lines = builtin_text("wiki").splitlines()
    assert not any(line.startswith(("<doc ", "</doc>")) for line in lines)


@pytest.mark.network
def test_altered_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSEARCH_CACHE", str(tmp_path))
    builtin_text("technical")
    (file,) = tmp_path.rglob("technical.utf8")
    file.write_text("something else")
    with pytest.raises(BadInput, match=r"technical\.utf8 is damaged"):
        builtin_text("technical")
