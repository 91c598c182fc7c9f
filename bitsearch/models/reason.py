"""Why a library failed, as part of a one-line message."""

from __future__ import annotations

import textwrap


def reason(error: Exception) -> str:
    """The message of a foreign error on one line of at most 300 characters."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
