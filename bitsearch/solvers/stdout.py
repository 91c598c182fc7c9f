"""Keep native code from printing into a command's machine output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what file descriptor 1 receives to stderr meanwhile.

    HiGHS writes through C++ streams, which `contextlib.redirect_stdout` does
    not reach. The descriptor belongs to the whole process: other threads that
    print meanwhile are redirected too.
    """
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed: there is nothing to protect
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
