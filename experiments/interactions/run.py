"""Do pair terms beat the additive model at 2 to 3 bits?

    python experiments/interactions/run.py tiny --out RUNS --results RESULTS.json

For each seed (of the labels drawn, and of everything else) three policies a
budget, by the same damage table: without pair terms, with the correlations of
the sketch as they are (raw), and with those shrunk by the strength that held-out
windows chose. Each is measured on held-out text as it is: no selection, no
neighbours. Stopped and started again, finished tables and measurements are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitsearch.budget import parse_budget, resources
from bitsearch.damage import measure
from bitsearch.evaluate import interval
from bitsearch.interactions import measured_sketch
from bitsearch.judge import Judge
from bitsearch.objectives.interactions import correlations, pair_terms
from bitsearch.session import Session, open_session
from bitsearch.solvers import quadratic
from bitsearch.solvers.problem import Problem


def main() -> None:
    """Measure one model at several seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--windows", default="64,2,64")
    parser.add_argument("--samples", type=int, default=1024, help="label draws over all windows")
    parser.add_argument("--candidates", default="int{2,3,4,5,6,8}-g64,bf16")
    parser.add_argument("--damage", default="fisher_output")
    parser.add_argument("--budgets", default="2.6bpw,2.8bpw,3.0bpw,3.5bpw")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("length", "windows", "candidates")}
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        out = options.out / f"{options.model}-{seed}"
        with open_session(options.model, out, options.device, {**given, "seed": seed}) as session:
            session.save()
            runs.append(compare(session, options.damage, options.samples, options.budgets))
        found = {
            "model": options.model,
            "damage": options.damage,
            "settings": given,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("numpy", "scipy", "torch", "transformers")},
            "runs": runs,
        }
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found)


def compare(session: Session, estimator: str, samples: int, budgets: str) -> dict[str, Any]:
    """The three policies of every budget at one seed."""
    started = time.monotonic()
    damage = measure(session, estimator, lambda *_: None)
    table_seconds = time.monotonic() - started
    sketch = measured_sketch(session, samples, lambda *_: None)
    sketch_seconds = time.monotonic() - started - table_seconds
    shrunk, strength = correlations(sketch)
    raw = shrunk / strength if strength else shrunk
    space, final = session.space, Judge(session, "evaluation")
    rows = []
    for text in budgets.split(","):
        costs, limits = resources([parse_budget(text, space)], space)
        additive = Problem(damage, costs, limits)
        row: dict[str, Any] = {"budget": text, "policies": {}}
        qualities = {}
        for name, pairs in (("additive", None), ("shrunk", shrunk), ("raw", raw)):
            terms = None if pairs is None else pair_terms(damage, pairs)
            problem = replace(additive, pairs=terms)
            clock = time.monotonic()
            solution = quadratic.solve(problem, seed=session.settings.seed)
            seconds = time.monotonic() - clock
            qualities[name] = final.quality(solution.choice)
            difference = qualities[name].kl - qualities["additive"].kl
            row["policies"][name] = {
                "predicted": solution.damage,
                "kl": qualities[name].mean_kl,
                "kl_ci": interval(qualities[name].kl),
                "minus_additive": float(difference.mean()),
                "minus_additive_ci": interval(difference),
                "gap": solution.gap,
                "seconds": round(seconds, 2),
                "bytes": space.total_bytes(solution.choice),
            }
        rows.append(row)
    windows = len(sketch)
    return {
        "seed": session.settings.seed,
        "samples": int(sketch.shape[0] * sketch.shape[1]),
        "strength": strength,
        "strength_by_samples": {
            str(part * sketch.shape[1]): correlations(sketch[:part])[1]
            for part in (windows // 8, windows // 4, windows // 2)
            if part > 1
        },
        "seconds": {"table": round(table_seconds, 1), "sketch": round(sketch_seconds, 1)},
        "corpora": {purpose: corpus.sha256 for purpose, corpus in session.corpora.items()},
        "budgets": rows,
    }


def print_table(found: dict[str, Any]) -> None:
    """Markdown: predicted → measured KL of each policy, and shrunk − additive."""
    print("| seed | strength | budget | additive | shrunk | raw | shrunk − additive, 95 % |")
    print("|--:|--:|---|---|---|---|---|")
    for run in found["runs"]:
        for row in run["budgets"]:
            cells = [
                f"{policy['predicted']:.3f} → {policy['kl']:.4f}"
                for policy in row["policies"].values()
            ]
            shrunk = row["policies"]["shrunk"]
            low, high = shrunk["minus_additive_ci"]
            print(
                f"| {run['seed']} | {run['strength']:.2f} | {row['budget']} | {' | '.join(cells)} "
                f"| {shrunk['minus_additive']:+.4f} [{low:+.4f}, {high:+.4f}] |"
            )


if __name__ == "__main__":
    main()
