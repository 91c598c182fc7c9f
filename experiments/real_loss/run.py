"""What does each solver reach on held-out text for the tokens it spends on the real loss?

Every solver gets the same damage table, byte budget and calibration text. After
each policy that it measures on all of that text, its best one so far counts; each
of these is then measured on held-out text. Stopped and started again, it goes
on: measured losses are read back from the run directory.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.budget import parse_budget, resources
from bitsearch.calibration_loss import CalibrationLoss, calibration_loss, traits
from bitsearch.damage import measure
from bitsearch.judge import Judge
from bitsearch.session import Session, open_session
from bitsearch.solvers import bayesian, evolution, multipliers, nsga2, pareto_dp, random_search
from bitsearch.solvers.problem import Choice, Problem

METHODS: dict[str, Any] = {
    "evolution from exact": evolution.solve,
    "evolution from uniform": partial(evolution.solve, start=evolution.from_uniform),
    "multipliers (TPE)": multipliers.tpe,
    "multipliers (GP)": multipliers.gp,
    "TPE": bayesian.tpe,
    "GP": bayesian.gp,
    "NSGA-II": nsga2.solve,
    "random": random_search.solve,
}
CHECKPOINTS = (2, 5, 10, 20, 40)


class Recorded:
    """A loss that notes the best policy measured on all text, and the tokens spent until then."""

    def __init__(self, loss: CalibrationLoss) -> None:
        self._loss = loss
        self.pieces, self.piece_tokens = loss.pieces, loss.piece_tokens
        self.incumbents: list[tuple[int, float, Choice]] = []

    @property
    def spent(self) -> int:
        """Tokens spent."""
        return self._loss.spent

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> NDArray[np.float64]:
        """As the loss."""
        found = self._loss(choices, pieces, base)
        if len(pieces) == self.pieces:
            for choice, kl in zip(choices, found.mean(axis=1).tolist(), strict=True):
                if not self.incumbents or kl < self.incumbents[-1][1]:
                    self.incumbents.append((self.spent, kl, choice.copy()))
        return found


def main() -> None:
    """Run every method with every seed and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--damage", default="kl")
    parser.add_argument("--budget", default="2.6bpw")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--windows", default="32,16,64")
    parser.add_argument("--passes", type=int, default=40, help="over the calibration text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    given = {"length": options.length, "windows": options.windows}
    rows = stored(options.results)
    with open_session(options.model, options.out, options.device, given) as session:
        session.save()
        damage = measure(session, options.damage, lambda stage, done, total: None)
        costs, limits = resources([parse_budget(options.budget, session.space)], session.space)
        problem = Problem(damage, costs, limits)
        settings = {
            "model": options.model,
            "budget": options.budget,
            "damage": options.damage,
            "bytes": int(limits[0]),
            "text_tokens": session.corpora["calibration"].tokens.numel(),
            "held_out_tokens": session.corpora["evaluation"].tokens.numel(),
            "passes": options.passes,
            "versions": versions(session.device),
        }
        judge = Judge(session, "evaluation")
        exact = pareto_dp.solve(problem).choice
        done = {(row["method"], row["seed"]) for row in rows}
        for seed in range(options.seeds):
            for method in options.methods:
                if (method, seed) not in done:
                    rows.append(one_run(session, judge, problem, method, seed, options.passes))
                    content = {
                        **settings,
                        "exact": judge.quality(exact).mean_kl,
                        "runs": sorted(rows, key=lambda r: (r["method"], r["seed"])),
                    }
                    text = json.dumps(content, indent=1) + "\n"
                    options.results.write_text(text, encoding="utf-8")
    print_tables(json.loads(options.results.read_text(encoding="utf-8")))


def one_run(
    session: Session, judge: Judge, problem: Problem, method: str, seed: int, passes: int
) -> dict[str, Any]:
    """One method with one seed: its incumbents with tokens, calibration KL and held-out KL."""
    clock = time.process_time()
    with calibration_loss(session) as loss:
        recorded = Recorded(loss)
        METHODS[method](
            problem,
            recorded,
            tokens=passes * loss.pieces * loss.piece_tokens,
            seed=seed,
            traits=traits(session.space),
        )
        blocks = loss.replay.blocks_run, loss.replay.blocks_skipped
        spent = loss.spent
    return {
        "method": method,
        "seed": seed,
        "tokens": spent,
        "seconds": time.process_time() - clock,
        "blocks_run": blocks[0],
        "blocks_skipped": blocks[1],
        "incumbents": [
            {"tokens": tokens, "kl": kl, "held_out": judge.quality(choice).mean_kl}
            for tokens, kl, choice in recorded.incumbents
        ],
    }


def stored(path: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    return list(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.exists() else []


def versions(device: str) -> dict[str, str]:
    """What the numbers were made with."""
    import optuna
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optuna": optuna.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
    }


def print_tables(found: dict[str, Any]) -> None:
    """Markdown: held-out KL against tokens, and how soon evolution from exact gets there."""
    text, passes = found["text_tokens"], found["passes"]
    marks = [mark for mark in CHECKPOINTS if mark <= passes]
    print("| tokens | " + " | ".join(f"{mark * text:,}" for mark in marks) + " |")
    print("|---" * (len(marks) + 1) + "|")
    print("| exact | " + " | ".join([f"{found['exact']:.4f}"] * len(marks)) + " |")
    for method in METHODS:
        runs = [run for run in found["runs"] if run["method"] == method]
        if not runs:
            continue
        cells = [cell([at(run, mark * text) for run in runs]) for mark in marks]
        print(f"| {method} | " + " | ".join(cells) + " |")
    print("\n| seed | final KL from uniform | its tokens | from exact as low after | share |")
    print("|---" * 5 + "|")
    by = {(run["method"], run["seed"]): run for run in found["runs"]}
    for seed in sorted({run["seed"] for run in found["runs"]}):
        uniform = by.get(("evolution from uniform", seed))
        exact = by.get(("evolution from exact", seed))
        if uniform is None or exact is None:
            continue
        final = uniform["incumbents"][-1]
        reached = [i["tokens"] for i in exact["incumbents"] if i["kl"] <= final["kl"]]
        when = f"{reached[0]:,} | {reached[0] / final['tokens']:.3f}" if reached else "never | –"
        print(f"| {seed} | {final['kl']:.4f} | {final['tokens']:,} | {when} |")


def at(run: dict[str, Any], tokens: int) -> float:
    """Held-out KL of the incumbent after so many tokens; NaN if none was measured yet."""
    best = [i["held_out"] for i in run["incumbents"] if i["tokens"] <= tokens]
    return float(best[-1]) if best else float("nan")


def cell(values: list[float]) -> str:
    """Mean over seeds, and the span."""
    if not values or np.isnan(values).any():
        return "–"
    return f"{np.mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


if __name__ == "__main__":
    main()
