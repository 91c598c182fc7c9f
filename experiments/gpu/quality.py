"""KL on held-out text of the policies of gemma3-270m that `search` has timed.

    python experiments/gpu/quality.py --out runs/gpu_quality     # resumes

Their damage is a sum over single units; this is what the whole policies lose.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch

from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.session import open_session

RESULTS = Path(__file__).parent / "results"
GIVEN = {"candidates": "int{2,3,4,5,6,8}-g64,bf16", "length": 256, "windows": "8,8,16"}


def main() -> None:
    """Measure what is missing; write `results/quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_quality"), help="run directory")
    found = []
    rows = json.loads((RESULTS / "search.json").read_text(encoding="utf-8"))["rows"]
    with open_session("gemma3-270m", parser.parse_args().out, "cpu", GIVEN) as session:
        session.save()
        space, judge = session.space, Judge(session, "evaluation")
        names = [format.name for format in space.candidates]
        for row in rows:
            policy = row.pop("policy")
            choice = np.array([names.index(policy[unit.name]) for unit in space.layout.units])
            quality = judge.quality(choice)
            found.append(row | {"kl": quality.mean_kl, "kl_ci": interval(quality.kl)})
            print(found[-1], flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    content = {"given": GIVEN, "versions": versions, "rows": found}
    (RESULTS / "quality.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
