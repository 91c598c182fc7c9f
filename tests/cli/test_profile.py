"""`bitsearch profile` on this machine, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitsearch.kernels import ggml
from bitsearch.kernels.devices import Stability
from bitsearch.kernels.on_processor import OnProcessor
from bitsearch.kernels.profile_file import load_profile

Cli = Callable[..., Any]
SMALL = ("--shapes", "tiny", "--threads", "1", "--batch", "1", "--context", "32")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine is too busy: tests run beside others."""
    stability = Stability(spread=0.15, drift=1e9, error=(0.08, 0.15, 0.95))
    monkeypatch.setattr(OnProcessor, "stability", stability)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("device", "formats"),
    [("ggml", "gguf-q4_k,gguf-q8_0,bf16"), ("torch-cpu", "int4-g64,int8-row-sym,bf16")],
)
def test_this_machine_is_profiled_and_checked(
    cli: Cli, tmp_path: Path, device: str, formats: str
) -> None:
    path = tmp_path / "profile.jsonl"
    made = ("profile", *SMALL, "--device", device, "--candidates", formats, "--out", path)
    assert "not checked yet" in cli(*made).out
    profile = load_profile(path)
    launches = [cell for cell in profile.cells if cell.op == "linear"]
    assert {cell.segments[0][1] for cell in launches} == set(formats.split(","))
    assert all(cell.median_us > 0 and cell.error < 0.03 and cell.n >= 9 for cell in launches)
    assert [cell.op for cell in profile.cells if cell not in launches] == ["rest"]
    assert "add --force" in cli(*made).complaint(2)
    shown = cli("profile", "--check", path).out
    assert "rank correlation" in shown and "uniform-bf16" in shown
    (check,) = load_profile(path).header.checks
    assert len(check.configurations) >= 23
    assert all(row.measured_us > 0 for row in check.configurations)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--device", "tpu"), 2, "unknown device 'tpu'; known: "),
        (("--batch", "one"), 2, "--batch one: write numbers"),
        (("--batch", "", "--prefill", ""), 2, "nothing to time"),
        (("--context", "99999"), 4, "takes at most"),
        (("--candidates", "int3-g64"), 4, "runs none of these formats for model.embed_tokens"),
        (("--check", "nowhere.jsonl"), 4, "nowhere.jsonl cannot be read"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    cli: Cli, tmp_path: Path, arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    given = ("profile", *SMALL, "--out", tmp_path / "p.jsonl", *arguments)
    assert complaint in cli(*given).complaint(code)
    assert not (tmp_path / "p.jsonl").exists()


def test_without_the_wheel_ggml_names_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    ggml.library.cache_clear()
    message = cli("profile", *SMALL, "--device", "ggml").complaint(4)
    assert "pip install 'bitsearch[ggml]'" in message and "--device torch-cpu" in message
    ggml.library.cache_clear()
