"""A device whose times are known."""

from __future__ import annotations

import pytest

from bitsearch.testing_devices import Clockwork


@pytest.fixture
def clockwork() -> Clockwork:
    """A device whose 8 bits are faster than its 4."""
    return Clockwork({"int4-g32": 1.0, "int8-g32": 0.75, "bf16": 2.0})
