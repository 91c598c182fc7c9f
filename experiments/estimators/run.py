"""How well does each estimator rank policies, and what does the policy it yields lose?

For each budget, the same random feasible policies are measured on selection
text and ranked by every estimator's predicted damage; then the exact solver's
policy for each estimator is measured on held-out text, as it is: no selection,
no neighbours. Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitsearch.budget import parse_budget, resources
from bitsearch.contenders import random_policies
from bitsearch.damage import measure
from bitsearch.diagnostics import rank_correlation
from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.objectives.estimators import ESTIMATORS
from bitsearch.session import Session, open_session
from bitsearch.solvers import load_solver
from bitsearch.solvers.problem import Problem

BUDGETS = ("3.5bpw", "4.0bpw", "4.5bpw", "5.0bpw", "6.0bpw", "7.0bpw")


def main() -> None:
    """Measure one model and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", default="8,16,32")
    parser.add_argument("--candidates")
    parser.add_argument("--random", type=int, default=32, help="random policies a budget")
    parser.add_argument("--estimators", default=",".join(ESTIMATORS), help="kl among them")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("length", "windows", "candidates")}
    with open_session(options.model, options.out, options.device, given) as session:
        session.save()
        found = compare(session, options.estimators.split(","), options.random)
    options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found)


def compare(session: Session, estimators: list[str], random: int) -> dict[str, Any]:
    """Tables of the estimators, rank correlations, and held-out KL by budget."""
    tables, seconds = {}, {}
    for name in estimators:
        started = time.monotonic()
        tables[name] = measure(session, name, lambda stage, done, total: None)
        seconds[name] = round(time.monotonic() - started, 1)
        print(name, seconds[name], "s", flush=True)
    measured = tables["kl"]
    lossy = [c for c, format in enumerate(session.space.candidates) if not format.exact]
    cells = {
        name: rank_correlation(
            table[:, lossy].ravel().tolist(), measured[:, lossy].ravel().tolist()
        )
        for name, table in tables.items()
    }
    budgets = [at_budget(session, tables, text, random) for text in BUDGETS]
    return {
        "model": session.settings.model,
        "versions": versions(session),
        "settings": {
            "candidates": session.settings.candidates,
            "length": session.settings.length,
            "windows": session.settings.windows,
            "seed": session.settings.seed,
            "corpora": {p: c.sha256 for p, c in session.corpora.items()},
        },
        "table_seconds": seconds,
        "cell_rank_correlation_with_kl": cells,
        "budgets": budgets,
    }


def at_budget(session: Session, tables: dict[str, Any], text: str, random: int) -> dict[str, Any]:
    """Rank correlation and held-out KL of every estimator at one budget."""
    space, seed = session.space, session.settings.seed
    costs, limits = resources([parse_budget(text, space)], space)
    selection, evaluation = Judge(session, "selection"), Judge(session, "evaluation")
    policies = random_policies(Problem(tables["kl"], costs, limits), random, seed)
    losses = [selection.quality(policy.choice).mean_kl for policy in policies]
    rows = {}
    for name, table in tables.items():
        problem = Problem(table, costs, limits)
        choice = load_solver("pareto_dp")(problem, seed=seed).choice
        quality = evaluation.quality(choice)
        predicted = [problem.total_damage(policy.choice) for policy in policies]
        rows[name] = {
            "rank_correlation": rank_correlation(predicted, losses),
            "kl": quality.mean_kl,
            "kl_ci": interval(quality.kl),
            "perplexity": quality.perplexity,
            "bytes": space.total_bytes(choice),
        }
    print(text, {name: round(row["kl"], 4) for name, row in rows.items()}, flush=True)
    return {"budget": text, "limit_bytes": parse_budget(text, space).limit, "estimators": rows}


def versions(session: Session) -> dict[str, str]:
    """What the numbers were made with."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if session.device.startswith("cuda") else ""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": gpu or platform.machine(),
    }


def print_table(found: dict[str, Any]) -> None:
    """Markdown: held-out KL by budget, and the mean rank correlation."""
    names = [row["budget"] for row in found["budgets"]]
    print(f"| {found['model']} | ρ cells | ρ policies | {' | '.join(names)} | seconds |")
    print("|---" * (len(names) + 4) + "|")
    for name, cell in found["cell_rank_correlation_with_kl"].items():
        rows = [budget["estimators"][name] for budget in found["budgets"]]
        rho = np.mean([row["rank_correlation"] for row in rows])
        losses = " | ".join(f"{row['kl']:.4f}" for row in rows)
        print(f"| {name} | {cell:.3f} | {rho:.3f} | {losses} | {found['table_seconds'][name]} |")


if __name__ == "__main__":
    main()
