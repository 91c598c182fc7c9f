"""The tree keeps the shape that packaging and readers rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MAX_LINES = 450
LINKED = ("kernels", "objectives")
RUFF = ("-m", "ruff", "check", "--no-cache", "--output-format=json")


@pytest.mark.parametrize("name", LINKED)
def test_root_folder_is_not_a_package(root: Path, name: str) -> None:
    # transformers looks for a module named "kernels" and runs what it finds.
    assert (root / name).is_dir()
    assert not (root / name / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKED)
def test_package_links_to_the_root_folder(root: Path, name: str) -> None:
    link = root / "bitsearch" / name
    assert link.is_symlink(), f"bitsearch/{name} must be a link: check git's core.symlinks"
    assert os.readlink(link) == f"../{name}"


def test_no_file_is_too_long(root: Path) -> None:
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("bitsearch", "experiments", "kernels", "objectives", "tests")
        for suffix in ("py", "cu", "cuh", "cpp", "h", "j2")
        for path in (root / folder).rglob(f"*.{suffix}")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_records_name_no_place_of_the_machine_that_made_them(root: Path) -> None:
    place = re.compile(rb"(?<![\w.:/-])/(?:home|mnt|opt|root|tmp|Users|usr|var|work)/[\w.-]+")
    found = {
        f"{path.relative_to(root)}: {match.group().decode()}"
        for path in (root / "experiments").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        for match in place.finditer(path.read_bytes())
    }
    assert found == set()


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import kernels\n", "TID251"),
        ("import kernels.pack\n", "TID251"),
        ("from objectives.cost import bytes\n", "TID251"),
        ("import torch\n\ntorch.load('weights.pt')\n", "TID251"),
        ("from torch import load\n", "TID251"),
        ("import pickle\n\npickle.loads(b'')\n", "S301"),
        ("import marshal\n\nmarshal.loads(b'')\n", "S302"),
        ("eval('1')\n", "S307"),
        ("import yaml\n\nyaml.load('a: 1', Loader=yaml.Loader)\n", "S506"),
    ],
)
def test_lint_refuses(root: Path, source: str, code: str) -> None:
    assert code in lint(root, source)


def test_lint_accepts_the_ways_to_do_it(root: Path) -> None:
    source = (
        "from safetensors.torch import load_file\n\n"
        "import bitsearch.kernels\n"
        "import bitsearch.objectives\n\n"
        "print(bitsearch.kernels, bitsearch.objectives, load_file)\n"
    )
    assert lint(root, source) == set()


def lint(root: Path, source: str) -> set[str]:
    """Codes of what ruff finds in a file of the package with this source."""
    result = subprocess.run(
        [sys.executable, *RUFF, "--stdin-filename", root / "bitsearch" / "snippet.py", "-"],
        cwd=root,
        input=source,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stderr
    return {finding["code"] for finding in json.loads(result.stdout)}
