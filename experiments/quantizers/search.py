"""What does a search add to a quantizer, and are the bytes better spent on smaller groups?

    python experiments/quantizers/search.py smollm2-135m --out RUNS --results RESULTS.json

For every quantizer, at the bytes of each uniform format of `--uniform`: that format
everywhere, against the exact solver's policy over each set of candidates, scored and
measured with the same quantizer, as it is: no selection, no controls. Then, with
`--gap gptq` and the embedding kept at 16 bits: uniform 3 bits in groups of
128 against `search` at the same bytes, and the share of the gap in perplexity to
the 16-bit model that it closes on each text (Sieberling et al., "EvoPress", ICML
2025, ask the same). Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.budget import parse_budget, resources
from bitsearch.damage import measure
from bitsearch.evaluate import Quality, interval, perplexity
from bitsearch.formats import parse_formats
from bitsearch.judge import Judge
from bitsearch.policy import load_policy
from bitsearch.run import atomic_write, read_json
from bitsearch.search import Request, search
from bitsearch.session import Session, open_session
from bitsearch.solvers import load_solver
from bitsearch.solvers.problem import Problem
from bitsearch.space import unit_bytes

ESTIMATOR = "fisher_output"
GAP_FORMAT = "int3-g128"
GAP_CANDIDATES = "int{2,3,4,5,6}-g128"


def main() -> None:
    """Measure what is missing, write the results and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON file, also to go on from")
    parser.add_argument(
        "--quantizers", default="rtn,gptq", help="such as rtn; rtn/awq after a preparation"
    )
    parser.add_argument(
        "--uniform", default="int{3,4}-g{64,128}", help="formats that set the bytes"
    )
    parser.add_argument(
        "--sets",
        default="uniform; widths: int{2,3,4,5,6,8}-g128; both: int{2,3,4,5,6,8}-g{64,128}",
        help="sets of candidates; `uniform` is the one format alone",
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", default="8,16,32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gap", help="quantizer of the last part; none leaves it out")
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("model", "length", "windows", "seed")}
    content = read_json(options.results) if options.results.exists() else {"asked": asked}
    if content["asked"] != asked:
        parser.error(f"{options.results} was made with {content['asked']}; give another --results")
    content["versions"] = {name: version(name) for name in ("numpy", "torch", "transformers")}
    rows = content.setdefault("rows", [])

    def keep() -> None:
        atomic_write(options.results, (json.dumps(content, indent=1) + "\n").encode())

    for quantizer in filter(None, options.quantizers.split(",")):
        for part in options.sets.split(";"):
            name, _, candidates = (text.strip() for text in part.partition(":"))
            for row in same_bytes(options, quantizer, name, candidates or options.uniform, rows):
                rows.append(row)
                keep()
    if options.gap and "gap" not in content:
        content["gap"] = gap(options, options.gap)
        keep()
    print_rows(rows)
    print(json.dumps(content.get("gap"), indent=1))


def opened(options: argparse.Namespace, quantizer: str, folder: str, **given: Any) -> Any:
    """A session of the model with the options' texts."""
    given |= {name: getattr(options, name) for name in ("length", "windows", "seed")}
    method, _, prepare = quantizer.partition("/")
    given |= {"quantizer": method, "prepare": prepare or None, "target": "none"}
    run = options.out / f"{options.model}-{quantizer.replace('/', '-')}-{folder}"
    return open_session(options.model, run, options.device, given)


def same_bytes(
    options: argparse.Namespace,
    quantizer: str,
    name: str,
    candidates: str,
    rows: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """A row of one set of candidates for the bytes of each uniform format, if it is missing."""
    done = {(row["quantizer"], row["set"], row["budget_of"]) for row in rows}
    missing = [
        format
        for format in parse_formats(options.uniform)
        if (quantizer, name, format.name) not in done
    ]
    if not missing:
        return
    with opened(options, quantizer, name, candidates=candidates) as session:
        session.save()
        judge = Judge(session, "evaluation")
        layout = session.space.layout
        for format in missing:
            limit = layout.kept_bytes + sum(unit_bytes(unit, format) for unit in layout.units)
            start = time.monotonic()
            if name == "uniform":
                column = session.space.candidates.index(format)
                choice = np.full(len(session.space.units), column)
            else:
                choice = solved(session, limit)
            quality = judge.quality(choice)
            print(quantizer, name, format.name, round(quality.mean_kl, 4), flush=True)
            yield {
                "quantizer": quantizer,
                "set": name,
                "candidates": candidates,
                "budget_of": format.name,
                "limit_bytes": limit,
                "bytes": session.space.total_bytes(choice),
                "seconds": round(time.monotonic() - start, 1),
                **figures(quality, judge),
                "windows": quality.kl.tolist(),
            }


def solved(session: Session, limit: int) -> NDArray[np.int64]:
    """The exact solver's choice within so many bytes."""
    damage = measure(session, ESTIMATOR, lambda stage, done, total: None)
    costs, limits = resources([parse_budget(f"{limit}B", session.space)], session.space)
    problem = Problem(damage, costs, limits)
    choice: NDArray[np.int64] = load_solver("pareto_dp")(problem, seed=session.settings.seed).choice
    return choice


def figures(quality: Quality, judge: Judge) -> dict[str, Any]:
    """KL with its interval and perplexities, of all texts and of each."""
    texts = sorted(set(judge.corpus.names))
    reference = judge.reference_nll
    return {
        "kl": quality.mean_kl,
        "kl_ci": interval(quality.kl),
        "perplexity": quality.perplexity,
        "reference_perplexity": perplexity(reference),
        "texts": {
            name: {
                "kl": quality.on(judge.corpus, name).mean_kl,
                "perplexity": quality.on(judge.corpus, name).perplexity,
                "reference_perplexity": perplexity(
                    reference[[window == name for window in judge.corpus.names]]
                ),
            }
            for name in texts
        },
    }


def gap(options: argparse.Namespace, quantizer: str) -> dict[str, Any]:
    """Uniform 3 bits against the searched policy of the same bytes, embedding at 16 bits."""
    kept = {"frozen": {"*embed_tokens": "bf16"}, "candidates": GAP_CANDIDATES}
    with opened(options, quantizer, "gap", **kept) as session:
        session.save()
        space = session.space
        names = [candidate.name for candidate in space.candidates]
        uniform = np.where(space.linear, names.index(GAP_FORMAT), names.index("bf16"))
        limit = space.total_bytes(uniform)
        judge = Judge(session, "evaluation")
        plain = judge.quality(uniform)
        found = search(
            session, Request((f"{limit}B",), ESTIMATOR, "pareto_dp", 0), lambda *stage: None
        )
        rows = load_policy(Path(found["policy"])).modules
        formats = [rows[unit.matrices[0].name].format for unit in space.units]
        chosen = judge.quality(np.array([names.index(name) for name in formats]))
        result = {
            "quantizer": quantizer,
            "shipped": found["shipped"],
            "limit_bytes": limit,
            "bytes": found["bytes"],
            "difference_ci": interval(chosen.kl - plain.kl),
            "uniform": figures(plain, judge),
            "searched": figures(chosen, judge),
        }
    result["share"] = {
        name: 1
        - (text["perplexity"] - text["reference_perplexity"])
        / (
            result["uniform"]["texts"][name]["perplexity"]
            - result["uniform"]["texts"][name]["reference_perplexity"]
        )
        for name, text in result["searched"]["texts"].items()
    }
    return result


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for every quantizer and number of bytes, in Markdown."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    print("| bytes of | bytes | quantizer |" + "".join(f" {name} |" for name in sets))
    print("|---|--:|---|" + "--:|" * len(sets))
    found = {(row["budget_of"], row["quantizer"], row["set"]): row for row in rows}
    for budget, quantizer in dict.fromkeys((row["budget_of"], row["quantizer"]) for row in rows):
        kl = [found.get((budget, quantizer, name)) for name in sets]
        limit = next(row["limit_bytes"] for row in kl if row)
        cells = [f"{row['kl']:.4f}" if row else "" for row in kl]
        print(f"| {budget} | {limit:,} | {quantizer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
