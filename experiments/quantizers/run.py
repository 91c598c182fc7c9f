"""What does each quantizer make of the same format, everywhere in a model?

    python experiments/quantizers/run.py tiny --out RUNS --results RESULTS.json

Every unit of the model, embedding included, is put into one format by one quantizer
and measured on held-out text. Differences are paired by window, against `rtn`.
Units whose rows a GGUF type cannot cut into its blocks take the type that llama.cpp
falls back to. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitsearch.evaluate import interval
from bitsearch.formats import parse_formats
from bitsearch.judge import Judge
from bitsearch.run import atomic_write, read_json
from bitsearch.session import open_session

FALLBACK = {
    "gguf-q2_k": "gguf-q4_0",
    "gguf-q3_k": "gguf-q4_0",
    "gguf-iq4_xs": "gguf-iq4_nl",
    "gguf-q4_k": "gguf-q5_0",
    "gguf-q5_k": "gguf-q5_1",
    "gguf-q6_k": "gguf-q8_0",
}


def main() -> None:
    """Measure what is missing, write the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON file, also to go on from")
    parser.add_argument(
        "--quantizers", default="rtn,gptq", help="rtn first; rtn/awq after a preparation"
    )
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
        for row in measure(quantizer, options, rows):
            rows.append(row)
            content["versions"] = {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers")},
            }
            atomic_write(options.results, (json.dumps(content, indent=1) + "\n").encode())
    print_table(rows)


def measure(
    quantizer: str, options: argparse.Namespace, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of one quantizer that are missing."""
    formats = [format.name for format in parse_formats(options.formats)]
    others = {FALLBACK[name] for name in formats if name in FALLBACK} - set(formats)
    method, _, prepare = quantizer.partition("/")
    given = {
        "quantizer": method,
        "prepare": prepare or None,
        "target": "none",
        "candidates": ",".join([*formats, *sorted(others)]),
        "length": options.length,
        "windows": options.windows,
        "seed": options.seed,
    }
    # the formats name the run: more of them may be asked for later
    folder = options.out / f"{options.model}-{quantizer.replace('/', '-')}-{options.formats}"
    with open_session(options.model, folder, options.device, given) as session:
        space = session.space
        parameters = np.array([unit.parameters for unit in space.units])
        done = {(row["quantizer"], row["format"]) for row in rows}
        names = [candidate.name for candidate in space.candidates]
        for index, name in enumerate(formats):
            if (quantizer, name) in done:
                continue
            session.save()
            judge = Judge(session, "evaluation")
            fitting = space.allowed[:, index]
            choice = np.where(fitting, index, names.index(FALLBACK.get(name, name)))
            nll = judge.reference_nll
            _ = session.weights
            start = time.perf_counter()
            for unit, candidate in space.assignment(choice):
                for matrix in unit.matrices:
                    session.weights.quantized(matrix, candidate)
            seconds = time.perf_counter() - start
            found = judge.quality(choice)
            yield {
                "quantizer": quantizer,
                "format": name,
                "fitting": float(fitting @ parameters / parameters.sum()),
                "device": device_name(session.device),
                "bytes": space.total_bytes(choice),
                "seconds": round(seconds, 1),
                "kl": found.mean_kl,
                "kl_ci": interval(found.kl),
                "perplexity": found.perplexity,
                "reference_perplexity": float(np.exp(nll.mean())),
                "top1": float(found.top1.mean()),
                "windows": found.kl.tolist(),
            }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()


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
