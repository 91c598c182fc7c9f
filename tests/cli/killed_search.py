"""Searches that are killed: imports once, then forks one child for each attempt.

    python killed_search.py FOLDER ARGUMENT…

runs `bitsearch ARGUMENT… --out FOLDER/NAME` for several NAMEs, each killed again
and again, at a chosen write or a random moment, until it finishes. Prints a JSON
object with the number of kills by NAME.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from bitsearch.cli import main


def die() -> NoReturn:
    """As if the power failed."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed_at(name: str, count: int, *, before: bool) -> Callable[[], None]:
    """Arms a child to die at the count-th call of a function of `os`."""

    def arm() -> None:
        real, left = getattr(os, name), count

        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == 0 and before:
                die()
            result = real(*arguments)
            if left == 0:
                die()
            return result

        setattr(os, name, call)

    return arm


def attempt(arguments: list[str], arm: Callable[[], None], after: float | None) -> bool:
    """Run the command in a child; whether it was killed."""
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        arm()
        sys.argv = ["bitsearch", *arguments]
        try:
            main()
        except SystemExit as done:
            os._exit(0 if done.code is None else int(done.code))
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit(f"exit code {os.WEXITSTATUS(status)}")
    return False


def until_done(arguments: list[str], arms: list[tuple[Callable[[], None], float | None]]) -> int:
    """Kill it in each of the given ways, then let it finish; the number of kills."""
    kills = sum(attempt(arguments, *arm) for arm in arms)
    assert not attempt(arguments, lambda: None, None)
    return kills


def scenarios() -> dict[str, list[tuple[Callable[[], None], float | None]]]:
    """Ways to be killed, by the name of the run that suffers them."""
    rng = random.Random(0)
    return {
        "straight": [],
        "write": [
            (killed_at("fsync", count, before=before), None)
            for count, before in ((1, True), (2, False), (7, True), (11, False), (17, True))
        ],
        "rename": [
            (killed_at("replace", count, before=before), None)
            for count in (1, 2, 3)
            for before in (True, False)
        ],
        "moment": [(lambda: None, rng.uniform(0.05, 1.2)) for _ in range(6)],
    }


if __name__ == "__main__":
    folder, *command = sys.argv[1:]
    print(
        json.dumps(
            {
                name: until_done([*command, "--out", f"{folder}/{name}"], arms)
                for name, arms in scenarios().items()
            }
        )
    )
