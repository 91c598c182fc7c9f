"""The run directory: what exists, what matches, and how to resume.

Files appear whole or not at all (written beside, synced, renamed). Results that
grow one by one go to a journal: each line carries a checksum, and a line torn
by a crash is dropped when the journal is opened again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitsearch.errors import BadInput, OutOfResources, SettingsMismatch

STATISTICS = "statistics.safetensors"
PREPARATION = "preparation.safetensors"
_LOCK, _OWNER = ".lock", ".pid"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one line that names the path.

    Raises:
        OutOfResources: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free some space and run the same command again, it resumes"
        else:
            advice = "choose another --out"
        raise OutOfResources(f"cannot write {path}: {reason}; {advice}") from error


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    Args:
        path: of the file.
        content: all of it, or its pieces in turn.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in (content,) if isinstance(content, bytes) else content:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def file_sha256(path: Path) -> str:
    """Hash of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file that bitsearch wrote.

    Raises:
        BadInput: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it to make it anew") from error


class Journal:
    """An append-only file of JSON records, safe against being killed at any moment.

    Opening one only reads it; a torn tail is cut off when the next record is added.

    Raises:
        BadInput: it cannot be read, or is damaged before its last record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Any] = []
        self._sound = 0
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error
        for line in content.splitlines(keepends=True):
            record = _parse_line(line)
            if record is None:
                break
            self.records.append(record)
            self._sound += len(line)
        if b"\n" in content[self._sound :].rstrip(b"\n"):
            raise BadInput(f"{path} is damaged at byte {self._sound}; delete it to make it anew")

    def append(self, record: Any) -> None:
        """Add a record; it is on the disk when this returns."""
        body = json.dumps(record, separators=(",", ":"))
        line = f"{zlib.crc32(body.encode()):08x} {body}\n".encode()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if file.tell() > self._sound:
                    file.truncate(self._sound)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.records.append(record)
        self._sound += len(line)

    def remove(self) -> None:
        """Delete the file with its records."""
        self.path.unlink(missing_ok=True)
        self.records.clear()
        self._sound = 0


def _parse_line(line: bytes) -> Any | None:
    """The record of a whole, undamaged line, else None."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != f"{zlib.crc32(body):08x}".encode():
        return None
    return json.loads(body)


class Run:
    """An open run directory; one process at a time.

    Args:
        path: the directory; made if missing.

    Raises:
        BadInput: another process works in it.
        OutOfResources: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = not path.exists()
        self._journals: dict[str, Journal] = {}
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / _LOCK)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise BadInput(
                    f"another bitsearch (process {self._owner()}) works in {path}; wait for it, "
                    "or choose another --out"
                ) from error
            (path / _OWNER).write_text(str(os.getpid()))

    def close(self) -> None:
        """Let other processes use the directory; nothing stays of one that was never used."""
        (self.path / _OWNER).unlink(missing_ok=True)
        if self._made and os.listdir(self.path) == [_LOCK]:
            (self.path / _LOCK).unlink()
            self.path.rmdir()
        self._lock.release()

    def _owner(self) -> str:
        """The process that works in the directory, as far as it can be read."""
        try:
            return (self.path / _OWNER).read_text() or "?"
        except OSError:
            return "?"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def journal(self, name: str) -> Journal:
        """The journal of a name, with the records it holds; one object for each."""
        if name not in self._journals:
            self._journals[name] = Journal(self.path / name)
        return self._journals[name]

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file into the directory; its path."""
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        atomic_write(self.path / name, text.encode())
        return self.path / name

    def settle(self, name: str, settings: Mapping[str, Any]) -> None:
        """Keep the settings of a part of the run, or check that they are the kept ones.

        Raises:
            SettingsMismatch: they differ; the message names both values.
        """
        path = self.path / name
        if not path.exists():
            self.write_json(name, settings)
            return
        check_same(read_json(path), json.loads(json.dumps(settings)), path)

    def log(self, event: str, **details: Any) -> None:
        """Append an event with its time to `log.jsonl`."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details}
        with writing(self.path), open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def check_same(stored: Any, asked: Any, where: Path, key: str = "") -> None:
    """Compare nested settings.

    Raises:
        SettingsMismatch: at the first setting that differs.
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            inner = f"{key}.{name}" if key else name
            check_same(stored.get(name), asked.get(name), where, inner)
    elif isinstance(stored, list) and isinstance(asked, list) and len(stored) == len(asked):
        for index, pair in enumerate(zip(stored, asked, strict=True)):
            check_same(*pair, where, f"{key}.{index}" if key else str(index))
    elif stored != asked:
        raise SettingsMismatch(str(where), key or "settings", stored, asked)
