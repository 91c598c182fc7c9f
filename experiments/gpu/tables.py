"""`bitsearch profile` on the GPU, its check on whole models, and a search under milliseconds.

The models' configurations are enough: times do not depend on weights. The damage table of
gemma3-270m is the one of experiments/solver_gaps (measured KL).
"""

from __future__ import annotations

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
OUT = Path("/tmp/res")
CANDIDATES = {
    "gemma3-270m": "int{2,3,4,5,6,8}-g64,bf16",
    "llama3-8b": "int{2,3,4,5,6,8}-g128-sym,bf16",
}


def _quiet(stage: str, done: int, total: int) -> None: ...


def _profiled(result: dict[str, Any], model: str, regimes: list[str]) -> None:
    path, folder = OUT / f"profile-{model}.jsonl", HERE / "models" / model
    made = make_profile(
        str(folder),
        path,
        [parse_regime(text) for text in regimes],
        device="cuda",
        threads=1,
        candidates=CANDIDATES[model],
        revision=None,
        rounds=3,
        seed=0,
        progress=_quiet,
    )
    result["profile_seconds"] = made["seconds"]
    print(f"profile of {model}: {made['seconds']:.1f} s, {made['cells']} cells", flush=True)
    found = check_profile(path, None, revision=None, seed=0, progress=_quiet)
    result["checks"] = found["checks"]
    for check in found["checks"]:
        print(
            model, check["regime"], f"mean error {check['mean_error']:.3f}",
            f"worst {check['worst_error']:.3f} spearman {check['spearman']:.3f}", check["passed"],
            flush=True,
        )  # fmt: skip


def profile_gemma(result: dict[str, Any]) -> None:
    """Table and check of gemma3-270m."""
    _profiled(result, "gemma3-270m", ["batch=1"])


def profile_llama(result: dict[str, Any]) -> None:
    """Table and check of Llama-3-8B's shapes."""
    _profiled(result, "llama3-8b", ["batch=1"])


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
    """Policies under a time and under bytes, each measured from end to end."""
    path = OUT / f"profile-{model}.jsonl"
    profile, regime = load_profile(path), parse_regime("batch=1")
    layout, config, _ = open_layout(str(HERE / "models" / model))
    formats = list(parse_formats(CANDIDATES[model]))
    allowed = np.ones(damage.shape, bool)
    times = latency(profile, path, layout, formats, allowed, regime)
    device = open_device("cuda", 1)
    solve = load_solver("pareto_dp")
    ends = [times.total(np.full(len(layout.units), column)) for column in (0, len(formats) - 1)]
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = int(min(ends) + share * (max(ends) - min(ends)))
        fast = solve(_problem(damage, times, budget)).choice
        weight = int(size[np.arange(len(fast)), fast].sum())
        small = solve(Problem(damage, size[None], np.array([weight]))).choice
        reached = float(damage[np.arange(len(fast)), fast].sum())
        equal = _smallest(solve, damage, size, reached)
        for name, choice in (("time", fast), ("bytes", small), ("bytes at its damage", equal)):
            policy = [(unit, formats[c]) for unit, c in zip(layout.units, choice, strict=True)]
            measured, wall = measured_step(device, layout, config, policy, regime)
            row = {
                "budget_us": budget / 1e3, "by": name,
                "predicted_us": times.total(np.asarray(choice)) / 1e3,
                "measured_us": measured / 1e3, "wall_us": wall / 1e3,
                "damage": float(damage[np.arange(len(choice)), choice].sum()),
                "bytes": int(size[np.arange(len(choice)), choice].sum()),
                "policy": {unit.name: format.name for unit, format in policy},
            }  # fmt: skip
            result["rows"].append(row)
            print({key: row[key] for key in row if key != "policy"}, flush=True)


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
