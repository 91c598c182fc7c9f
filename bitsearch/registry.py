"""Look a plugin up by name: built-in tables first, then entry points.

A built-in table maps a name to `module:attribute`, so that listing names
imports nothing. Other packages add theirs under an entry-point group such as
`bitsearch.solvers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from bitsearch.errors import UsageError


def names(group: str, builtin: Mapping[str, str]) -> list[str]:
    """All names of a kind: built-in ones in table order, then third-party ones."""
    installed = sorted({point.name for point in entry_points(group=group)} - builtin.keys())
    return [*builtin, *installed]


def load(group: str, builtin: Mapping[str, str], name: str) -> Any:
    """The object registered under `name` in `group`.

    Raises:
        UsageError: nobody registered that name; the message lists those known.
    """
    if name in builtin:
        module, _, attribute = builtin[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=group, name=name):
        return point.load()
    kind = group.rpartition(".")[2].removesuffix("s")
    raise UsageError(f"unknown {kind} '{name}'; known: {', '.join(names(group, builtin))}")
