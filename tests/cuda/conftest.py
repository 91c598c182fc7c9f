"""Builds the host program of the kernels once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from bitsearch.kernels.emulation import Emulator, build

Build = Callable[..., Emulator]


@pytest.fixture(scope="session")
def build_emulator(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build` with the compiler that is here."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return lambda *flags, **source: build(
        compiler, tmp_path_factory.mktemp("emulator"), *flags, **source
    )


@pytest.fixture(scope="session")
def emulator(build_emulator: Build) -> Emulator:
    """The host program without sanitizers."""
    return build_emulator()
