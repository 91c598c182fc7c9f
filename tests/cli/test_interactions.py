"""`search --solver quadratic`: a sketch of interactions, measured once and reused."""

from __future__ import annotations

from typing import Any

import pytest

from bitsearch.objectives import interactions


def test_quadratic_search(cli: Any, searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsearch.interactions.SAMPLES", 64)
    asked = ("search", searched.run, "--solver", "quadratic", "--diagnostics", "3", "--json")
    found = cli(*asked, "-b", "4.5bpw").json
    assert found["bytes"] <= found["limit_bytes"][0]
    assert found["solver"]["name"] == "quadratic"
    assert 0 <= found["solver"]["gap"] < 0.5
    file = searched.run / "interactions.safetensors"
    sketch = file.read_bytes()
    assert cli("check", searched.run).code == 0

    def never(*_: Any) -> None:
        raise AssertionError("the sketch is there")

    monkeypatch.setattr(interactions, "score_sketch", never)
    again = cli(*asked, "-b", "5bpw").json
    assert again["bytes"] > found["bytes"]
    assert file.read_bytes() == sketch
    monkeypatch.setattr("bitsearch.interactions.SAMPLES", 128)
    assert "draws" in cli(*asked, "-b", "5bpw").complaint(4)
    file.write_bytes(sketch[:-9])
    assert "delete it to measure anew" in cli(*asked, "-b", "5bpw").complaint(4)


def test_few_formats_are_refused_before_anything_is_measured(cli: Any, searched: Any) -> None:
    line = cli(
        "search", searched.run, "-b", "5bpw", "--solver", "quadratic", "--distinct", "2"
    ).complaint(2)
    assert "solver 'quadratic' cannot limit the number of distinct candidates" in line
    assert not (searched.run / "interactions.safetensors").exists()
