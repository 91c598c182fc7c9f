"""`bitsearch profile` on the GPU, its check on whole models, and a search under milliseconds.

The models' configurations are enough: times do not depend on weights. The damage table of
gemma3-270m is the one of experiments/solver_gaps (measured KL).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from bitsearch.formats import parse_formats
from bitsearch.kernels.devices import open_device
from bitsearch.kernels.profile_file import load_profile
from bitsearch.kernels.regime import parse_regime
from bitsearch.models.load import open_layout
from bitsearch.objectives.cost.latency import latency
from bitsearch.objectives.cost.steps import measured_step
from bitsearch.profile import check_profile, make_profile
from bitsearch.solvers import load_solver
from bitsearch.solvers.problem import Problem
from bitsearch.tables import read_table

HERE = Path(__file__).parent
REGIMES = ("batch=1", "batch=64")
CANDIDATES = {
    "gemma3-270m": "int{2,3,4,5,6,8}-g64,bf16",
    "llama3-8b": "int{2,3,4,5,6,8}-g128-sym,bf16",
}


def _quiet(stage: str, done: int, total: int) -> None: ...


def _table(model: str) -> Path:
    """The profile of a model, in the folder that `run.py` was given."""
    return Path(sys.argv[1]) / f"profile-{model}.jsonl"


def _profiled(result: dict[str, Any], model: str) -> None:
    path = _table(model)
    made = make_profile(
        os.path.relpath(HERE / "models" / model),
        path,
        [parse_regime(text) for text in REGIMES],
        device="cuda",
        threads=1,
        candidates=CANDIDATES[model],
        revision=None,
        rounds=3,
        seed=0,
        progress=_quiet,
    )
    result["profile_seconds"], result["in_step"] = made["seconds"], made["in_step"]
    print(f"profile of {model}: {made['seconds']:.1f} s, {made['in_step']}", flush=True)
    found = check_profile(path, None, revision=None, seed=0, progress=_quiet)
    result["checks"] = found["checks"]
    for check in found["checks"]:
        print(
            model, check["regime"], f"mean error {check['mean_error']:.3f}",
            f"worst {check['worst_error']:.3f} spearman {check['spearman']:.3f}", flush=True,
        )  # fmt: skip


def profile_gemma(result: dict[str, Any]) -> None:
    """Table and check of gemma3-270m."""
    _profiled(result, "gemma3-270m")


def profile_llama(result: dict[str, Any]) -> None:
    """Table and check of Llama-3-8B's shapes."""
    _profiled(result, "llama3-8b")


def search(result: dict[str, Any]) -> None:
    """Policies of gemma3-270m, by measured KL."""
    table = HERE.parent / "solver_gaps" / "tables" / "gemma3-270m.safetensors"
    damage, header = read_table(table)
    layout, _, _ = open_layout(str(HERE / "models" / "gemma3-270m"))
    names = [format.name for format in parse_formats(CANDIDATES["gemma3-270m"])]
    assert [unit.name for unit in layout.units] == list(header["units"])
    assert names == list(header["candidates"])
    with safe_open(table, framework="numpy") as file:
        size = np.asarray(file.get_tensor("bytes"), np.int64)
    _search(result, "gemma3-270m", damage, size)


def search_llama(result: dict[str, Any]) -> None:
    """Policies of Llama-3-8B's shapes, by a made-up damage: there are no weights here.

    A unit's damage is its sensitivity times 4^-bits times its weights; sensitivities are drawn,
    log-normal with a spread of e.
    """
    layout, _, _ = open_layout(str(HERE / "models" / "llama3-8b"))
    formats = parse_formats(CANDIDATES["llama3-8b"])
    spread = np.exp(np.random.default_rng(0).normal(size=len(layout.units)))
    damage = np.zeros((len(layout.units), len(formats)))
    size = np.zeros(damage.shape, np.int64)
    for row, unit in enumerate(layout.units):
        for column, format in enumerate(formats):
            for matrix in unit.matrices:
                shape = matrix.out_features, matrix.in_features
                size[row, column] += format.bytes(*shape)
                if format.bits < 16:
                    damage[row, column] += spread[row] * 4.0**-format.bits * shape[0] * shape[1]
    _search(result, "llama3-8b", damage, size)


def _search(result: dict[str, Any], model: str, damage: Any, size: Any) -> None:
    """Policies under a time, under bytes, and under both, each measured from end to end."""
    path = _table(model)
    profile = load_profile(path)
    layout, config, _ = open_layout(str(HERE / "models" / model))
    formats = list(parse_formats(CANDIDATES[model]))
    device, units = open_device("cuda", 1), np.arange(len(layout.units))
    for text in REGIMES:
        regime = parse_regime(text)
        times = latency(profile, path, layout, formats, np.ones(damage.shape, bool), regime)
        for by, budgets, choice in _policies(damage, size, times):
            policy = [(unit, formats[c]) for unit, c in zip(layout.units, choice, strict=True)]
            measured, wall = measured_step(device, layout, config, policy, regime)
            row = {
                "regime": text, "by": by, **budgets,
                "predicted_us": times.total(np.asarray(choice)) / 1e3,
                "measured_us": measured / 1e3, "wall_us": wall / 1e3,
                "damage": float(damage[units, choice].sum()),
                "bytes": int(size[units, choice].sum()),
                "policy": {unit.name: format.name for unit, format in policy},
            }  # fmt: skip
            result["rows"].append(row)
            print({key: row[key] for key in row if key != "policy"}, flush=True)


def _policies(damage: Any, size: Any, times: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """What they were found by, their budgets, and they."""
    solve, units = load_solver("milp"), np.arange(len(size))
    fastest = times.total(times.nanoseconds.argmin(1))
    widest = times.total(np.full(len(size), size.shape[1] - 1))
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = int(fastest + share * (widest - fastest))
        told = {"budget_us": budget / 1e3}
        fast = solve(_problem(damage, times, budget)).choice
        yield "time", told, fast
        weight = int(size[units, fast].sum())
        yield "bytes", told, solve(Problem(damage, size[None], np.array([weight]))).choice
        reached = float(damage[units, fast].sum())
        yield "bytes at its damage", told, _smallest(solve, damage, size, reached)
    for share in (0.25, 0.4):
        weight = int(share * size.max(1).sum())
        small = solve(Problem(damage, size[None], np.array([weight]))).choice
        yield "these bytes", {"budget_bytes": weight}, small
        for cut in (0.95, 0.9):
            budget = int(fastest + cut * (times.total(small) - fastest))
            costs, limits = np.stack([size, times.nanoseconds]), [weight, budget - times.rest]
            told = {"budget_bytes": weight, "budget_us": budget / 1e3}
            yield "both", told, solve(Problem(damage, costs, np.array(limits))).choice


def _problem(damage: Any, times: Any, budget: int) -> Problem:
    return Problem(damage, times.nanoseconds[None], np.array([budget - times.rest]))


def _smallest(solve: Any, damage: Any, size: Any, reached: float) -> Any:
    """The policy of fewest bytes whose damage is no larger."""
    low, high = int(size.min(1).sum()), int(size.max(1).sum())
    while high - low > 10_000:
        middle = (low + high) // 2
        if solve(Problem(damage, size[None], np.array([middle]))).damage <= reached:
            high = middle
        else:
            low = middle
    return solve(Problem(damage, size[None], np.array([high]))).choice
