"""The quantizers by name: (weight, format, importance) -> Encoded.

One with a parameter `moment` is also given the second moment of the inputs.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from bitsearch import registry

GROUP = "bitsearch.quantizers"

QUANTIZERS = {
    "rtn": "bitsearch.quantizers.rtn:quantize",
    "hqq": "bitsearch.quantizers.hqq:quantize",
    "gptq": "bitsearch.quantizers.gptq:quantize",
    "dialect_lookup": "bitsearch.quantizers.dialect:lookup",
}


def load_quantizer(name: str) -> Any:
    """The quantizer of a name.

    Raises:
        UsageError: no such quantizer.
    """
    return registry.load(GROUP, QUANTIZERS, name)


def needs_second_moments(quantizer: Any) -> bool:
    """Whether a quantizer takes `moment`, a `second_moment.SecondMoment` or None."""
    return "moment" in signature(quantizer).parameters
