"""Killed at any moment and started again, a search ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_a_killed_search_resumes_to_the_same_policy(place: Any, cli: Any) -> None:
    arguments = [str(a) for a in place.search()]
    at = arguments.index("--out")
    del arguments[at : at + 2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "killed_search.py"), place.path, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills["straight"] == 0
    assert kills["write"] == 5 and kills["rename"] == 6 and kills["moment"] >= 1
    straight = place.path / "straight"
    for name in kills:
        run = place.path / name
        for file in ("policy.json", "policies/4.5bpw.json", "space.json", "front.json",
                     "tables/fisher_output.safetensors", "statistics.safetensors"):  # fmt: skip
            assert (run / file).read_bytes() == (straight / file).read_bytes(), (name, file)
        one, other = (_timeless(r / "result.json") for r in (run, straight))
        assert one == other
        assert not list(run.rglob("*.tmp")) and cli("check", run).code == 0


def _timeless(path: Path) -> dict[str, Any]:
    """A result without seconds, memory and place."""
    found = json.loads(path.read_text())
    for key in ("seconds", "measure_seconds", "peak_rss_bytes", "policy"):
        del found[key]
    del found["solver"]["seconds"]
    return dict(found)
