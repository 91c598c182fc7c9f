"""What the tests of this folder look at: the checkout, and every module in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def package_files(root: Path) -> list[Path]:
    """Every file of the package relative to the root, through the two links."""
    return sorted(
        Path(folder, name).relative_to(root)
        for folder, _, names in os.walk(root / "bitsearch", followlinks=True)
        for name in names
        if not folder.endswith("__pycache__")
    )


@pytest.fixture(scope="session")
def modules(root: Path, package_files: list[Path]) -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): root / path
        for path in package_files
        if path.suffix == ".py"
    }
