"""Are damage scores from gradients in bfloat16 as good as those in float32?

    python experiments/search_on_gpu/run.py smollm2-135m --out RUNS --results RESULTS.json

Every estimator runs twice on the same text, with the model in either type. Its two
tables are compared by rank over all cells, and by what the exact solver makes of
them: each policy is measured on held-out text by the model in float32, as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from bitsearch.budget import parse_budget, resources
from bitsearch.damage import measure
from bitsearch.diagnostics import rank_correlation
from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.session import Session, open_session
from bitsearch.solvers import load_solver
from bitsearch.solvers.problem import Problem

ESTIMATORS = "fisher_output,fisher_weight,fisher_output_data,first_order"
BUDGETS = ("3.5bpw", "4.0bpw", "4.5bpw", "5.0bpw", "6.0bpw")
TYPES = ("float32", "bfloat16")


def main() -> None:
    """Measure one model and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", default="64,16,32")
    parser.add_argument("--candidates", default="int{2,3,4,5,6,8}-g64,bf16")
    parser.add_argument("--estimators", default=ESTIMATORS)
    options = parser.parse_args()
    estimators = options.estimators.split(",")
    given = {name: getattr(options, name) for name in ("length", "windows", "candidates")}
    tables: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in estimators}
    seconds: dict[str, dict[str, float]] = {name: {} for name in estimators}
    for dtype in reversed(TYPES):
        folder = options.out / f"{options.model}-{dtype}"
        with open_session(
            options.model, folder, options.device, given | {"dtype": dtype, "target": "none"}
        ) as session:
            session.save()
            for name in estimators:
                started = time.monotonic()
                tables[name][dtype] = measure(session, name, lambda stage, done, total: None)
                seconds[name][dtype] = round(time.monotonic() - started, 1)
                print(name, dtype, seconds[name][dtype], "s", flush=True)
            if dtype == "float32":
                rows = {name: compared(session, tables[name]) for name in estimators}
                gpu = session.device.startswith("cuda")
    for name, row in rows.items():
        row["seconds"] = seconds[name]
    found = {
        "model": options.model,
        "settings": given,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "estimators": rows,
    }
    options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compared(session: Session, tables: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Rank correlation of two tables, and held-out KL of the policies that they give."""
    space = session.space
    lossy = [c for c, format in enumerate(space.candidates) if not format.exact]
    one, other = (tables[dtype][:, lossy].ravel().tolist() for dtype in TYPES)
    judge = Judge(session, "evaluation")
    budgets = []
    for text in BUDGETS:
        costs, limits = resources([parse_budget(text, space)], space)
        choices = [
            load_solver("pareto_dp")(Problem(tables[dtype], costs, limits), seed=0).choice
            for dtype in TYPES
        ]
        kl = [judge.quality(choice).kl for choice in choices]
        budgets.append(
            {
                "budget": text,
                "kl": dict(zip(TYPES, [float(value.mean()) for value in kl], strict=True)),
                "difference": float((kl[1] - kl[0]).mean()),
                "difference_ci": interval(kl[1] - kl[0]),
                "other_units": int((choices[0] != choices[1]).sum()),
                "units": len(choices[0]),
            }
        )
        print(text, budgets[-1], flush=True)
    return {"rank_correlation": rank_correlation(one, other), "budgets": budgets}


if __name__ == "__main__":
    main()
