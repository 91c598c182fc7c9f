"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bitsearch.errors import BadInput, OutOfResources


@contextmanager
def appearing(out: Path, size: int, force: bool, marks: Collection[str]) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes it, whole, when the body is done.

    Args:
        out: the folder to make.
        size: bytes that will be written, at least.
        force: replace a folder of the same kind.
        marks: files that tell such a folder.

    Raises:
        BadInput: something else is in the way.
        OutOfResources: the disk is full, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    _check_replaceable(out, force, marks)
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    aside = beside.with_name(f"{beside.name}.old")
    try:
        free = shutil.disk_usage(beside).free
        if free < size:
            raise OutOfResources(f"{out} takes {size:,} bytes, and {free:,} are free there")
        yield beside
        with saving(out):
            for path in [*beside.iterdir(), beside]:
                path.chmod(0o755 if path.is_dir() else 0o644)
                sync(path)
            if out.exists():
                os.replace(out, aside)
            os.replace(beside, out)
            sync(out.parent)
    except BaseException:
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(out: Path, force: bool, marks: Collection[str]) -> None:
    """Refuse to write over anything but an empty folder, or with force one of the same kind."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise BadInput(f"{out} is in the way and is not a folder; choose another --out")
    holds = set(os.listdir(out))
    if not holds:
        return
    ours = set(marks) <= holds and "space.json" not in holds
    if not ours:
        raise BadInput(f"{out} holds something else than a checkpoint; choose another --out")
    if not force:
        raise BadInput(f"{out} exists already; --force replaces it, or choose another --out")


@contextmanager
def saving(out: Path) -> Iterator[None]:
    """Turn a failure to write into one line that names the path."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise OutOfResources(
            f"cannot write {out}: {error.strerror or error}; no part of it was kept"
        ) from error
    except SafetensorError as error:
        raise OutOfResources(f"cannot write {out}: {error}; no part of it was kept") from error


def sync(path: Path) -> None:
    """Let a file or the entries of a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
