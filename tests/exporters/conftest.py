"""Policies of the shipped model and of small skeletons, without a search."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bitsearch.exporters.base import Reading
from bitsearch.exporters.pipeline import policy_of
from bitsearch.formats import parse_format
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.load import open_layout
from bitsearch.policy import Policy, save_policy
from bitsearch.units import ModelLayout

Make = Callable[[Mapping[str, str]], Path]


@pytest.fixture(scope="session")
def layout() -> ModelLayout:
    """Of `tiny`: six Llama blocks of 256, a tied head."""
    return open_layout("tiny")[0]


@pytest.fixture(scope="session")
def hashes() -> dict[str, str]:
    found = fingerprint(open_layout("tiny")[2])
    return {key: value for key, value in found.items() if value}


def policy_with(layout: ModelLayout, hashes: dict[str, str], formats: Mapping[str, str]) -> Policy:
    """The policy with these formats by module or tensor; all else stays at 16 bits."""
    tensors = {m.module: m.name for unit in layout.units for m in unit.matrices}
    named = {tensors.get(module, module): parse_format(name) for module, name in formats.items()}
    return policy_of(layout, hashes, Reading(named), {})


@pytest.fixture(scope="session")
def policy_for() -> Callable[..., Policy]:
    """`policy_with`, for layouts of one's own."""
    return policy_with


@pytest.fixture
def make_policy(layout: ModelLayout, hashes: dict[str, str], tmp_path: Path) -> Make:
    """Writes a policy of `tiny`: formats by module name without `model.layers.`."""

    def make(formats: Mapping[str, str]) -> Path:
        full = {
            name if name.startswith(("model", "lm_head")) else f"model.layers.{name}": format
            for name, format in formats.items()
        }
        path = tmp_path / "made.json"
        path.write_text(save_policy(policy_with(layout, hashes, full)))
        json.loads(path.read_text())
        return path

    return make
