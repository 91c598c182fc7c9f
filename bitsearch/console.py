"""What a command shows: progress and errors on stderr, results on stdout."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitsearch.errors import BitsearchError

# Long lines stay whole: a path that is cut in two cannot be copied.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)


@contextmanager
def reporting() -> Iterator[None]:
    """Turn expected errors into one line on stderr and the exit code of the design."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("bitsearch").setLevel(logging.INFO)
    try:
        yield
    except BitsearchError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        command = shlex.join(["bitsearch", *sys.argv[1:]])
        _fail(f"stopped; what was measured is saved. To go on: {command}", 130)
    except MemoryError:
        _fail("out of memory; use fewer or shorter windows, or a smaller model", 5)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _fail(f"cannot write {error.filename or 'to the disk'}: {os.strerror(error.errno)}", 5)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        _fail("out of memory; use fewer or shorter windows, or a smaller model", 5)


def _fail(message: str, code: int) -> None:
    text = " ".join(message.split())
    sys.stderr.write(f"bitsearch: {text}\n")
    raise SystemExit(code)


class Stages:
    """A progress bar for each stage of a command, on stderr and only on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are finished."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
            if not err.is_terminal:
                err.print(f"{stage}: {total} steps")
        self._progress.update(self._tasks[stage], completed=done, total=total)


def emit(found: Any, as_json: bool, show: Callable[[], None]) -> None:
    """One JSON object on standard output, or what people read."""
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        show()
