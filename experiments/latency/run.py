"""Does a search under milliseconds keep them, and is it worth more than one under bytes?

    python experiments/latency/run.py                 everything, resumed where it stopped
    python experiments/latency/run.py --again         the same, with every time measured anew
    python experiments/latency/run.py --tables        writes the tables of the results again

1. the latency table of SmolLM2-135M on this processor, one thread, and its check on whole
   models in uniform and random formats;
2. searches under budgets between the fastest policy and 8 bits everywhere, for one sequence
   and for sixteen, beside every uniform format that keeps the same measured time;
3. the optimum under bytes alone at several sizes, those of the policies of 2 among them, with
   the same table of damage, and how long its steps take.

Times mean something only on a machine that does nothing else. KL does not depend on that:
it is kept between runs.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from bitsearch.budget import parse_budget, resources
from bitsearch.damage import measure
from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.kernels.profile_file import load_profile, use_of
from bitsearch.kernels.regime import Regime, parse_regime
from bitsearch.objectives.cost.latency import latency
from bitsearch.profile import check_profile, make_profile
from bitsearch.search import Request, search
from bitsearch.session import Session, open_session
from bitsearch.solvers import pareto_dp
from bitsearch.solvers.problem import Choice, Problem
from bitsearch.timed import Timing, open_timing

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
CANDIDATES = (
    "gguf-q2_k,gguf-q3_k,gguf-q4_k,gguf-q5_k,gguf-q6_k,gguf-q4_0,gguf-q5_0,"
    "gguf-q5_1,gguf-q8_0,gguf-iq4_nl,bf16"
)
GIVEN = {"candidates": CANDIDATES, "length": 256, "windows": "8,8,16"}
REGIMES = ("batch=1,context=256", "batch=1,context=1024", "batch=16,context=256")
# Where between the fastest policy and 8 bits everywhere the budgets lie.
SHARES = {"batch=1,context=256": (0.1, 0.4), "batch=16,context=256": (0.5,)}
SIZES = ("4.6bpw", "5bpw", "5.5bpw", "6bpw", "7bpw", "8bpw")
ESTIMATOR = "fisher_output"


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/latency"), help="run directory")
    parser.add_argument("--again", action="store_true", help="measure every time anew")
    parser.add_argument("--tables", action="store_true", help="print the tables again")
    options = parser.parse_args()
    profile, results = HERE / "results/profile.jsonl", HERE / "results/searches.json"
    if options.again:
        profile.unlink(missing_ok=True)
        (options.out / "times.journal").unlink(missing_ok=True)
    if not options.tables:
        table(profile)
        with open_session(MODEL, options.out, "cpu", GIVEN) as session:
            content = searches(session, profile)
        results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = io.StringIO()
    with redirect_stdout(shown):
        print_check(profile)
        print_searches(json.loads(results.read_text(encoding="utf-8")))
    print(shown.getvalue())
    (HERE / "results/tables.md").write_text(shown.getvalue(), encoding="utf-8")


def table(path: Path) -> None:
    """The profile of this machine, and its check, unless they are there."""
    if not path.exists():
        regimes = [parse_regime(text) for text in REGIMES]
        make_profile(
            MODEL, path, regimes, device="ggml", threads=1, candidates=CANDIDATES, revision=None,
            rounds=5, seed=0, progress=told,
        )  # fmt: skip
    if not load_profile(path).header.checks:
        check_profile(path, None, revision=None, seed=0, progress=told)


def searches(session: Session, profile: Path) -> dict[str, Any]:
    """Searches under time, and policies under bytes alone with their times."""
    found: dict[str, Any] = {"versions": versions(), "time": [], "bytes": {}}
    for text, shares in SHARES.items():
        for share in shares:
            budget = f"{limit_of(session, profile, parse_regime(text), share):.2f}ms@{text}"
            request = Request((budget,), ESTIMATOR, "pareto_dp", 0, latency=profile)
            result = search(session, request, told)
            result["formats"] = formats_of(session, Path(result["policy"]))
            del result["policy"]
            found["time"].append(result)
        same = [f"{r['bytes']}B" for r in found["time"] if r["latency"][0]["regime"] == text]
        found["bytes"][text] = by_bytes(session, profile, text, [*SIZES, *same])
    return found


def limit_of(session: Session, profile: Path, regime: Regime, share: float) -> float:
    """Milliseconds at a share of the way from the fastest policy to 8 bits everywhere."""
    space = session.space
    time = latency(
        load_profile(profile), profile, space.layout, space.candidates, space.allowed, regime
    )
    eight = [format.name for format in space.candidates].index("gguf-q8_0")
    fastest = np.where(time.runs, time.nanoseconds, 2**62).min(axis=1).sum()
    slowest = time.nanoseconds[:, eight].sum()
    return float(time.rest + fastest + share * (slowest - fastest)) / 1e6


def by_bytes(
    session: Session, profile: Path, regime: str, sizes: list[str]
) -> list[dict[str, Any]]:
    """The optimum under bytes at several sizes: its KL on held-out text, and its time."""
    space = session.space
    timing = open_timing(
        session, space, [parse_budget(f"1s@{regime}", space)], profile, False, told
    )
    assert timing is not None
    space = timing.narrowed(space)
    damage = np.where(space.allowed, measure(session, ESTIMATOR, told), np.inf)
    judge, rows = Judge(session, "evaluation"), []
    for size in sizes:
        problem = Problem(damage, *resources([parse_budget(size, space)], space))
        choice = pareto_dp.solve(problem).choice
        rows.append({"budget": size, **described(session, timing, judge, choice)})
    return rows


def described(session: Session, timing: Timing, judge: Judge, choice: Choice) -> dict[str, Any]:
    """A policy's size, loss, time and formats."""
    quality = judge.quality(choice)
    (entry,) = timing.describe(choice)
    return {
        "bytes": session.space.total_bytes(choice),
        "bpw": 8 * session.space.total_bytes(choice) / session.space.layout.parameters,
        "kl": quality.mean_kl,
        "kl_ci": interval(quality.kl),
        "predicted_ms": entry.predicted_ms,
        "measured_ms": entry.measured_ms,
        "formats": Counter(f.name for _, f in session.space.assignment(choice)),
    }


def formats_of(session: Session, path: Path) -> dict[str, int]:
    """How many units of a policy file are in each format."""
    modules = json.loads(path.read_text(encoding="utf-8"))["modules"].values()
    return Counter(dict((m["unit"], m["format"]) for m in modules).values())


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}


def print_check(path: Path) -> None:
    """Markdown: how well the table predicts whole models."""
    header = load_profile(path).header
    print(f"\n{header.device}, {header.machine['name']}, {header.kernels}, threads "
          f"{header.protocol.threads}, load {header.load[0]:.2f}: {header.use}\n")  # fmt: skip
    print(
        "| regime | configurations | mean error | worst | Spearman | verdict |\n" + "|---" * 6 + "|"
    )
    for check in header.checks:
        print(
            f"| {check.regime} | {len(check.configurations)} | {100 * check.mean_error:.1f} % | "
            f"{100 * check.worst_error:.1f} % | {check.spearman:.3f} | "
            f"{use_of(check.times, check.ranks)} |"
        )


def print_searches(content: dict[str, Any]) -> None:
    """Markdown: time budgets beside the best uniform format, and beside byte budgets."""
    print("\n| budget | predicted | measured | wall | bpw | KL | best uniform in time | its ms | "
          "its KL | difference, paired 95 % |\n" + "|---" * 10 + "|")  # fmt: skip
    for row in content["time"]:
        (entry,) = row["latency"]
        uniform = [c for c in row["controls"] if c["name"].startswith("uniform-")]
        shown = "none | | | |"
        if uniform:
            best = min(uniform, key=lambda control: float(control["kl"]))
            low, high = best["difference_ci"]
            shown = (f"{best['name']} | {best['ms'][entry['regime']]:.2f} | {best['kl']:.4f} | "
                     f"{best['difference']:+.4f} [{low:+.4f}, {high:+.4f}] |")  # fmt: skip
        print(
            f"| {row['budget'][0]} | {entry['predicted_ms']:.2f} | {entry['measured_ms']:.2f} | "
            f"{entry['wall_ms']:.2f} | {row['bpw']:.2f} | {row['kl']:.4f} | {shown}"
        )
    for regime, rows in content["bytes"].items():
        print(f"\n| {regime} | bpw | KL | measured ms | formats |\n" + "|---" * 5 + "|")
        timed = [r for r in content["time"] if r["latency"][0]["regime"] == regime]
        every = [
            *((r["budget"][0], r, r["latency"][0]["measured_ms"]) for r in timed),
            *((r["budget"], r, r["measured_ms"]) for r in rows),
        ]
        for name, row, ms in sorted(every, key=lambda each: float(each[1]["kl"])):
            named = ", ".join(f"{n} {f}" for f, n in sorted(row["formats"].items()))
            print(f"| {name} | {row['bpw']:.2f} | {row['kl']:.4f} | {ms:.2f} | {named} |")
        for row in timed:
            ms = row["latency"][0]["measured_ms"]
            equal = [r for r in rows if r["kl"] <= row["kl"]]
            if equal:
                least = min(r["measured_ms"] for r in equal)
                print(
                    f"\n{row['budget'][0]}: {ms:.2f} ms at KL {row['kl']:.4f}; under bytes alone "
                    f"{least:.2f} ms at no more KL ({100 * (ms / least - 1):+.1f} %)"
                )


def told(stage: str, done: int, total: int) -> None:
    """Say when a stage begins and ends."""
    if done in (0, total):
        print(f"{stage}: {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
