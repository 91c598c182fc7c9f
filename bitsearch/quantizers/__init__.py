"""The quantizers by name: (weight, format, importance) -> Encoded."""

from __future__ import annotations

from typing import Any

from bitsearch import registry

GROUP = "bitsearch.quantizers"

QUANTIZERS = {
    "rtn": "bitsearch.quantizers.rtn:quantize",
    "dialect_lookup": "bitsearch.quantizers.dialect:lookup",
}


def load_quantizer(name: str) -> Any:
    """The quantizer of a name.

    Raises:
        UsageError: no such quantizer.
    """
    return registry.load(GROUP, QUANTIZERS, name)
