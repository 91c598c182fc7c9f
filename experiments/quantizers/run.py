"""What does each quantizer make of the same format, everywhere in a model?

    python experiments/quantizers/run.py tiny --out RUNS --results RESULTS.json

Every unit of the model, embedding included, is put into one format by one quantizer
and measured on held-out text. Differences are paired by window, against `rtn`.
Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.run import atomic_write, read_json
from bitsearch.session import open_session


def main() -> None:
    """Measure what is missing, write the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON file, also to go on from")
    parser.add_argument("--quantizers", default="rtn,gptq", help="rtn first")
    parser.add_argument("--formats", default="int{2,3,4}-g64")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", default="64,1,64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("model", "length", "windows", "seed")}
    content = read_json(options.results) if options.results.exists() else {"asked": asked}
    if content["asked"] != asked:
        parser.error(f"{options.results} was made with {content['asked']}; give another --results")
    rows = content.setdefault("rows", [])
    for quantizer in options.quantizers.split(","):
        measure(quantizer, options, rows)
        content["versions"] = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("bitsearch", "torch", "transformers")},
        }
        atomic_write(options.results, (json.dumps(content, indent=1) + "\n").encode())
    print_table(rows)


def measure(quantizer: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the rows of one quantizer that are missing."""
    given = {
        "quantizer": quantizer,
        "candidates": options.formats,
        "length": options.length,
        "windows": options.windows,
        "seed": options.seed,
    }
    # the formats name the run: more of them may be asked for later
    folder = options.out / f"{options.model}-{quantizer}-{options.formats}"
    with open_session(options.model, folder, options.device, given) as session:
        space = session.space
        done = {(row["quantizer"], row["format"]) for row in rows}
        for index, candidate in enumerate(space.candidates):
            if (quantizer, candidate.name) in done:
                continue
            session.save()
            judge = Judge(session, "evaluation")
            choice = np.full(len(space.units), index)
            nll = judge.reference_nll
            _ = session.weights
            start = time.perf_counter()
            for unit in space.units:
                for matrix in unit.matrices:
                    session.weights.quantized(matrix, candidate)
            seconds = time.perf_counter() - start
            found = judge.quality(choice)
            rows.append(
                {
                    "quantizer": quantizer,
                    "format": candidate.name,
                    "bytes": space.total_bytes(choice),
                    "seconds": round(seconds, 1),
                    "kl": found.mean_kl,
                    "kl_ci": interval(found.kl),
                    "perplexity": found.perplexity,
                    "reference_perplexity": float(np.exp(nll.mean())),
                    "top1": float(found.top1.mean()),
                    "windows": found.kl.tolist(),
                }
            )


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for every format and quantizer, in Markdown."""
    print("| format | bytes | quantizer | KL | − rtn, 95 % | perplexity | s to quantize |")
    print("|---|--:|---|--:|---|--:|--:|")
    plain = {row["format"]: row for row in rows if row["quantizer"] == "rtn"}
    for row in sorted(rows, key=lambda row: (row["bytes"], row["format"])):
        difference = ""
        if row["quantizer"] != "rtn" and row["format"] in plain:
            gained = np.array(row["windows"]) - np.array(plain[row["format"]]["windows"])
            low, high = interval(gained)
            difference = f"{gained.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        print(
            f"| {row['format']} | {row['bytes']:,} | {row['quantizer']} | {row['kl']:.4f} "
            f"| {difference} | {row['perplexity']:.2f} | {row['seconds']} |"
        )


if __name__ == "__main__":
    main()
