"""What do the published systems reach at equal bytes, as each one's own rule would choose?

For every recipe and budget the recipe's estimator scores, its solver chooses,
and that choice alone is measured on held-out text: no contender stands in for
it, as in `bitsearch search`. Each is run with its own candidates where they
reach the budget (`own`), and with the same candidates for all (`common`); and, if
asked, its own candidates, quantizer and preparation are run with the estimator and
the solver of `default` (`formats`), which compares formats alone.
Budgets in bits count the parameters of the model as it is: a head that a recipe
unties is in the bytes, not in the parameters. Stopped and started again, it goes
on; the seconds of the parts add up.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bitsearch.budget import check_feasible, parse_budget, resources
from bitsearch.calibration_loss import solve_measured
from bitsearch.contenders import byte_matched
from bitsearch.damage import measure
from bitsearch.errors import InfeasibleBudget
from bitsearch.evaluate import interval
from bitsearch.judge import Judge
from bitsearch.models.load import open_layout
from bitsearch.recipes import load_recipe, recipe_names
from bitsearch.run import atomic_write, read_json
from bitsearch.session import Session, open_session
from bitsearch.solvers import load_solver
from bitsearch.solvers.measured import needs_loss
from bitsearch.solvers.problem import Problem
from bitsearch.space import Space, make_space

COMMON = "int{2,3,4,5,6,8}-g64"
_OURS = {"candidates": COMMON, "fuse": True, "solver": "pareto_dp", "prepare": None}
BASELINES = {
    "bitsearch": _OURS | {"damage": "kl", "quantizer": "rtn"},
    "default": _OURS | {"damage": "fisher_output", "quantizer": "rtn"},
    "default-gptq": _OURS | {"damage": "fisher_output", "quantizer": "gptq"},
}
CONTROL = "filled-g64"


def main() -> None:
    """Run what is missing, write the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON file, also to go on from")
    parser.add_argument("--budgets", default="4.5bpw,3.5bpw")
    parser.add_argument("--recipes", default=",".join(recipe_names()))
    parser.add_argument("--whose", default="common,own", help="of common, own and formats")
    parser.add_argument("--against", default="bitsearch", choices=BASELINES)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--windows", default="8,4,32")
    parser.add_argument("--tokens", type=int, help="for measured solvers; default 64 passes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    asked = {
        name: getattr(options, name) for name in ("model", "length", "windows", "tokens", "seed")
    }
    content = read_json(options.results) if options.results.exists() else {"asked": asked}
    if content["asked"] != asked:
        parser.error(f"{options.results} was made with {content['asked']}; give another --results")
    rows = content.setdefault("rows", [])
    done = {(row["recipe"], row["candidates_of"], row["budget"]) for row in rows}
    for name in [options.against, *options.recipes.split(",")]:
        for whose in ("common",) if name in BASELINES else options.whose.split(","):
            missing = [b for b in options.budgets.split(",") if (name, whose, b) not in done]
            for row in _rows(name, whose, missing, options) if missing else ():
                rows.append(row)
                content["versions"] = _versions(options.device)
                atomic_write(options.results, (json.dumps(content, indent=1) + "\n").encode())
    for budget in options.budgets.split(","):
        print_table([row for row in rows if row["budget"] == budget], budget, options.against)


def _rows(
    name: str, whose: str, budgets: list[str], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One recipe with one set of candidates at each budget."""
    parts: dict[str, Any] = BASELINES.get(name) or load_recipe(name).model_dump()
    candidates = COMMON if whose == "common" else parts["candidates"]
    if whose == "formats":
        parts |= {part: BASELINES["default"][part] for part in ("damage", "solver", "fuse")}
    given = {
        "candidates": candidates,
        "fuse": parts["fuse"],
        "quantizer": parts["quantizer"],
        "prepare": parts["prepare"],
        "length": options.length,
        "windows": options.windows,
        "seed": options.seed,
    }
    print(f"{name}, {whose} candidates", flush=True)
    folder = options.out / f"{Path(options.model).name}-{name}-{whose}"
    with open_session(options.model, folder, options.device, given) as run:
        for text in budgets:
            row = {"recipe": name, "candidates_of": whose, "budget": text, "formats": candidates}
            row |= {part: parts[part] for part in ("damage", "solver", "quantizer", "prepare")}
            try:
                found = [_one(run, parts, text, options.tokens)]
                if name in BASELINES:
                    found.append(_control(run, text))
            except InfeasibleBudget as error:
                found = [{"out_of_reach": str(error)}]
            for one in found:
                yield row | one


def _one(session: Session, parts: dict[str, Any], text: str, tokens: int | None) -> dict[str, Any]:
    """Score, choose, and measure the choice."""
    problem = _problem(session, text)
    session.save()
    _ = session.weights  # input statistics: every search needs them, whatever its estimator
    with _spent(session, "scoring") as scoring:
        damage = measure(session, parts["damage"], lambda *_: None)
    problem = Problem(damage, problem.costs, problem.budgets)
    solver = load_solver(parts["solver"])
    with _spent(session, f"solving-{text}") as solving:
        if needs_loss(solver):
            named = (parts["solver"], solver)
            solution = solve_measured(session, problem, named, tokens, None, lambda *_: None)
        else:
            solution = solver(problem, seed=session.settings.seed)
    return {
        **_measured(session, solution.choice),
        "scoring_seconds": scoring["seconds"],
        "solving_seconds": solving["seconds"],
        "tokens": round(scoring["tokens"] + solving["tokens"]),
    }


def _problem(session: Session, text: str) -> Problem:
    """The problem of one budget, without damage yet."""
    space = session.space
    budgets = [parse_budget(text, _as_it_is(session))]
    check_feasible(budgets, space)
    return Problem(np.where(space.allowed, 0.0, np.inf), *resources(budgets, space))


def _as_it_is(session: Session) -> Space:
    """The space of the model with its head as it is, tied or not."""
    asked = session.settings
    layout = open_layout(asked.model, revision=asked.revision, fuse=asked.fuse)[0]
    return make_space(layout, session.space.candidates)


def _control(session: Session, text: str) -> dict[str, Any]:
    """Uniform widths with the rest of the budget spread over depth: what costs no search."""
    found = byte_matched(_problem(session, text), session.space, session.settings.seed)
    control = next(c for c in found if c.name in (CONTROL, "uniform-int8-g64"))
    none = {"scoring_seconds": 0.0, "solving_seconds": 0.0, "tokens": 0}
    ending = "" if session.settings.quantizer == "rtn" else f" ({session.settings.quantizer})"
    named = {"recipe": control.name + ending, "damage": "none", "solver": "none"}
    return {**named, **_measured(session, control.choice), **none}


def _measured(session: Session, choice: Any) -> dict[str, Any]:
    """A policy's bytes, what share of the parameters is in which format, and its quality."""
    quality = Judge(session, "evaluation").quality(choice)
    size = session.space.total_bytes(choice)
    parts: dict[str, float] = {}
    for unit, format in session.space.assignment(choice):
        share = unit.parameters / session.space.layout.parameters
        parts[format.name] = parts.get(format.name, 0.0) + share
    return {
        "bytes": size,
        "shares": {name: round(share, 4) for name, share in sorted(parts.items())},
        "bpw": 8 * size / _as_it_is(session).layout.parameters,
        "kl": quality.mean_kl,
        "kl_ci": interval(quality.kl),
        "perplexity": quality.perplexity,
        "kl_of_windows": quality.kl.tolist(),
    }


@contextmanager
def _spent(session: Session, stage: str) -> Iterator[dict[str, float]]:
    """Seconds and forward tokens of a stage, kept in the run so that parts add up.

    A token counts as the share of the decoder blocks that it passes; backward
    passes are not counted.
    """
    path = session.run.path / f"{stage}.spent.json"
    total = read_json(path) if path.exists() else {"seconds": 0.0, "tokens": 0.0}
    blocks = session.decoder.blocks
    firsts = {u.block: u.matrices[0].module for u in reversed(session.space.units)}
    firsts.pop(None, None)

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        state = args[0] if args else next(iter(kwargs.values()))
        total["tokens"] += state.shape[:-1].numel() / len(blocks)

    hooks = [
        session.decoder.model.get_submodule(name).register_forward_hook(count, with_kwargs=True)
        for name in firsts.values()
    ]
    clock = time.monotonic()
    try:
        yield total
    finally:
        total["seconds"] += time.monotonic() - clock
        for hook in hooks:
            hook.remove()
        session.run.write_json(path.name, total)


def _versions(device: str) -> dict[str, str]:
    import torch
    import transformers

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
    }


def print_table(rows: list[dict[str, Any]], budget: str, against: str) -> None:
    """Markdown, best first; the difference is from the baseline on the same windows."""
    ours = next(np.array(row["kl_of_windows"]) for row in rows if row["recipe"] == against)
    print(f"\n### {budget}\n")
    print(
        f"| recipe | candidates | bpw | bytes | KL | 95 % | − {against}, paired | perplexity | "
        "scoring s | solving s | tokens |"
    )
    print("|---" * 11 + "|")
    for row in sorted(rows, key=lambda row: float(row.get("kl", np.inf))):
        start = f"| {row['recipe']} | {row['candidates_of']}: `{row['formats']}` |"
        if "kl" not in row:
            print(f"{start} out of reach |" + " |" * 8)
            continue
        low, high = row["kl_ci"]
        difference = np.array(row["kl_of_windows"]) - ours
        apart = interval(difference)
        print(
            f"{start} {row['bpw']:.3f} | {row['bytes']:,} | {row['kl']:.4f} | "
            f"[{low:.4f}, {high:.4f}] | {difference.mean():+.4f} [{apart[0]:+.4f}, "
            f"{apart[1]:+.4f}] | {row['perplexity']:.2f} | {row['scoring_seconds']:.1f} | "
            f"{row['solving_seconds']:.2f} | {row['tokens']:,} |"
        )


if __name__ == "__main__":
    main()
