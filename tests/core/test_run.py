"""Files that appear whole, journals that survive being killed, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitsearch.errors import BadInput, OutOfResources, SettingsMismatch
from bitsearch.run import Journal, Run, atomic_write, check_same, read_json

RECORDS: list[Any] = [{"a": 1.5}, [0, 3, 1e-300], {"text": "Zeile\nδ\r"}, [], "last"]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal with a handful of records."""
    made = Journal(tmp_path / "x.journal")
    for record in RECORDS:
        made.append(record)
    return made.path


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"second, longer", b""):
        atomic_write(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OutOfResources, match=rf"{path}: No space left.*free some space.*resumes"):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_killed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even what is not an error, an interrupt, leaves no temporary file."""
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from bitsearch.errors import OutOfResources
from bitsearch.run import Journal, atomic_write

folder = Path(sys.argv[1])
atomic_write(folder / "file", b"old")
journal = Journal(folder / "journal")
journal.append("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: atomic_write(folder / "file", b"n" * 100_000),
    lambda: journal.append("s" * 100_000),
):
    try:
        write()
    except OutOfResources as error:
        print(error)
journal.append("after")
"""


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes stop in the middle."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("File too large; free some space") == 2 and not done.stderr
    assert (tmp_path / "file").read_bytes() == b"old"
    assert Journal(tmp_path / "journal").records == ["first", "after"]
    assert sorted(os.listdir(tmp_path)) == ["file", "journal"]


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(OutOfResources, match=r"cannot write /proc/nothing.*choose another --out"):
        Run(Path("/proc/nothing/run"))


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(OutOfResources, match="File exists; choose another --out"):
        Run(tmp_path / "run")


def test_journal_keeps_what_was_appended(journal: Path) -> None:
    assert Journal(journal).records == RECORDS


def test_a_tail_torn_anywhere_leaves_the_records_before_it(journal: Path, tmp_path: Path) -> None:
    raw = journal.read_bytes()
    last = raw.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(raw)):
        torn = tmp_path / "torn.journal"
        torn.write_bytes(raw[:end])
        opened = Journal(torn)
        assert opened.records == RECORDS[:-1]
        assert torn.read_bytes() == raw[:end], "opening changes nothing"
        opened.append("new")
        assert Journal(torn).records == [*RECORDS[:-1], "new"]
        torn.write_bytes(raw[:last] + raw[last:end] + b"\0" * (len(raw) - end))
        assert Journal(torn).records == RECORDS[:-1]


def test_damage_before_the_last_record_is_refused(journal: Path) -> None:
    raw = journal.read_bytes()
    first_lines = raw.rstrip(b"\n").rfind(b"\n")
    for at in range(first_lines):
        if raw[at : at + 1] == b"\n" and raw.find(b"\n", at + 1) == len(raw) - 1:
            continue  # joins the last two records, which reads as a torn tail
        journal.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(BadInput, match=r"damaged at byte \d+; delete it to make it anew"):
            Journal(journal)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_journal_is_a_prefix_or_refused(journal: Path, data: st.DataObject) -> None:
    good = journal.read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 30))]
            raw = raw or bytearray(b"x")
    journal.write_bytes(raw)
    try:
        records = Journal(journal).records
    except BadInput:
        pass
    else:
        # whole records may be missing, never changed
        left = iter(RECORDS)
        assert all(any(record == other for other in left) for record in records)
    finally:
        journal.write_bytes(good)


def test_a_failed_append_is_not_remembered(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Journal(journal)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutOfResources):
        opened.append("lost")
    monkeypatch.undo()
    assert opened.records == RECORDS
    opened.append("kept")
    assert Journal(journal).records == [*RECORDS, "kept"]


def test_a_journal_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.journal").mkdir()
    with pytest.raises(BadInput, match="cannot be read"):
        Journal(tmp_path / "x.journal")


def test_a_removed_journal_starts_anew(journal: Path) -> None:
    opened = Journal(journal)
    opened.remove()
    assert not journal.exists() and opened.records == []
    opened.append("new")
    assert Journal(journal).records == ["new"]


def test_users_of_one_journal_see_each_other(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        first, second = run.journal("x.journal"), run.journal("x.journal")
        first.append(1)
        second.append(2)
        first.append(3)
        assert Journal(tmp_path / "run" / "x.journal").records == [1, 2, 3]


HOLD = """
import sys
from pathlib import Path
from bitsearch.run import Run

with Run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=rf"process {other.pid}\) works in {path}; wait for it"):
            Run(path)
        other.kill()
    # A killed process holds nothing.
    with Run(path):
        pass


def test_an_unused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    with Run(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []
    with Run(tmp_path / "run") as run:
        run.write_json("x.json", {})
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "x.json"]
    (tmp_path / "mine").mkdir()
    with Run(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir(), "a folder of the user's stays"


def test_settings_are_settled_once(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        settings = {"length": 64, "nested": {"names": ["a", "b"]}, "shape": (1, 2)}
        run.settle("x.json", settings)
        run.settle("x.json", settings)
        assert read_json(tmp_path / "x.json") == json.loads(json.dumps(settings))
        with pytest.raises(SettingsMismatch, match=r"length=64, not length=32") as caught:
            run.settle("x.json", settings | {"length": 32})
        assert (caught.value.setting, caught.value.stored, caught.value.asked) == ("length", 64, 32)
        with pytest.raises(SettingsMismatch, match=r"nested\.names\.1='b', not nested\.names\.1='"):
            run.settle("x.json", settings | {"nested": {"names": ["a", "c"]}})


@pytest.mark.parametrize(
    "stored, asked, key",
    [
        ({"a": 1}, {}, "a"),
        ({}, {"a": 1}, "a"),
        ({"a": {"b": 1}}, {"a": 1}, "a"),
        ({"a": [1]}, {"a": [1, 2]}, "a"),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, "a.0.b"),
        ([1, 2], [1, 3], "1"),
        (1, 2, "settings"),
    ],
)
def test_the_first_difference_is_named(stored: Any, asked: Any, key: str) -> None:
    with pytest.raises(SettingsMismatch) as caught:
        check_same(stored, asked, Path("file"))
    assert caught.value.setting == key
    check_same(stored, stored, Path("file"))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_damaged_json_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(BadInput, match=r"x\.json is damaged .*delete it"):
        read_json(tmp_path / "x.json")
    with pytest.raises(BadInput, match="cannot be read"):
        read_json(tmp_path / "missing.json")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with Run(tmp_path) as run, pytest.raises(ValueError):
        run.write_json("x.json", {"kl": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_events_are_logged_as_lines(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.log("search", budgets=["4bpw"])
        run.log("done")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["search", "done"]
    assert lines[0]["budgets"] == ["4bpw"] and lines[0]["time"] <= lines[1]["time"]
