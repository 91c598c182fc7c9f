"""The kernels under the compiler's sanitizers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bitsearch.kernels.emulation import Emulator

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(
    build_emulator: Callable[..., Emulator], wrong: Callable[[Emulator], str], sanitizer: str
) -> None:
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g")
    assert wrong(build_emulator("-O1", "-DFEW_KINDS", *flags)) == ""
