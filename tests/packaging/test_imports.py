"""Importing the package works, and costs little where little is asked."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bitsearch import registry

HEAVY = {"torch", "transformers"}


def test_every_module_imports(modules: dict[str, Path]) -> None:
    for name in modules:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def test_every_registered_name_loads(modules: dict[str, Path]) -> None:
    loaded = set()
    for name in modules:
        if not name.endswith("__main__"):
            module = importlib.import_module(name)
            for variable, table in vars(module).items():
                if variable.isupper() and isinstance(table, dict) and hasattr(module, "GROUP"):
                    for key in table:
                        assert registry.load(module.GROUP, table, key) is not None
                    loaded.add(module.GROUP)
    assert {"bitsearch.estimators", "bitsearch.quantizers", "bitsearch.solvers"} <= loaded


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"]])
def test_help_imports_neither_torch_nor_transformers(root: Path, arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bitsearch", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr.splitlines()[-1]
    assert "Usage" in result.stdout
    seen = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "bitsearch.cli" in seen
    assert seen & HEAVY == set()
