"""Module names that another tool's patterns mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from bitsearch.errors import BadInput
from bitsearch.units import ModelLayout

_LINEAR, _EMBEDDING = "Linear", "Embedding"


def matching_modules(targets: Iterable[str], layout: ModelLayout) -> Iterator[str]:
    """Modules of a model that compressed-tensors targets mean.

    A target is a full name, `re:` with a pattern matched from the start, or a class.

    Raises:
        BadInput: a pattern is no regular expression.
    """
    classes = {
        matrix.module: _EMBEDDING if unit.kind == "embedding" else _LINEAR
        for unit in layout.units
        for matrix in unit.matrices
    }
    for target in targets:
        if target.startswith("re:"):
            try:
                pattern = re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise BadInput(f"'{target}' is no regular expression: {error}") from error
            yield from (name for name in classes if pattern.match(name))
        else:
            yield from (name for name, kind in classes.items() if target in (name, kind))
