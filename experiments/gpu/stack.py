"""Whole stacks of launches in one graph, and launches of several widths."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from speed import SHAPES, compiled, matmul_overlapping, rotated, spread
from torch.nn.functional import linear
from weights import random_fused, random_input

from bitsearch.kernels import entries, launches
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.partition import Tuning
from bitsearch.kernels.random_planes import Part
from bitsearch.kernels.replay import Replay

BLOCKS = 32
WIDTHS = (2, 3, 4, 5, 6, 8)
TUNINGS = [Tuning(28, 2), Tuning(24, 2), Tuning(24, 3), Tuning(20, 3), Tuning(16, 3),
           Tuning(16, 4), Tuning(16, 6), Tuning(12, 6)]  # fmt: skip
Choice = list[tuple[str, int]]


@cache
def _drawn(name: str, bits: int) -> Fused:
    rows, columns = SHAPES[name]
    return random_fused([(rows, bits, 128, True)], columns, bits)


def stack(result: dict[str, Any]) -> None:
    """All 224 linear layers of Llama-3-8B as 128 launches of one graph, predicted by sums."""
    single = {m: _singles(m) for m in (1, 16)}
    draw = random.Random(2)
    choices: dict[str, Choice] = {
        f"uniform-{bits}": [(name, bits) for _ in range(BLOCKS) for name in SHAPES]
        for bits in WIDTHS
    }
    for number in range(20):
        widths = draw.sample(WIDTHS, draw.randint(2, 4))
        choices[f"random-{number}"] = [
            (name, draw.choice(widths)) for _ in range(BLOCKS) for name in SHAPES
        ]
    for m in (1, 16):
        xs = {k: random_input(m, k, torch.bfloat16) for _, k in SHAPES.values()}
        for label, choice in choices.items():
            if m > 1 and label.startswith("random"):
                continue
            weights = [Fused(_drawn(*key).shapes, _drawn(*key).data.clone()) for key in choice]
            torch.cuda.synchronize()
            replay = Replay([partial(matmul_overlapping, xs[w.columns], w) for w in weights])
            row = _row(label, m, replay, sum(w.nbytes for w in weights))
            row["predicted_us"] = round(sum(single[m][key] for key in choice), 1)
            result["rows"].append(row)
            del weights
        dense = [random_input(*SHAPES[name], torch.bfloat16) for name, _ in choices["uniform-4"]]
        replay = Replay([partial(linear, xs[w.shape[1]], w) for w in dense])
        result["rows"].append(_row("cublas-bf16", m, replay, sum(w.nbytes for w in dense)))
        del dense
    errors = [abs(r["predicted_us"] / r["us"] - 1) for r in result["rows"] if "predicted_us" in r]
    result["mean_error"], result["worst_error"] = statistics.mean(errors), max(errors)
    for row in result["rows"]:
        print(row, flush=True)
    print(f"sum of launches: mean error {result['mean_error']:.3f}, worst {max(errors):.3f}")


def _singles(m: int) -> dict[tuple[str, int], float]:
    """Medians of single launches on rotated weights."""
    found = {}
    for name, (_, columns) in SHAPES.items():
        x = random_input(m, columns, torch.bfloat16)
        for bits in WIDTHS:
            weights = rotated(_drawn(name, bits))
            turns = max(1, 24 // len(weights))
            replay = Replay([partial(matmul_overlapping, x, w) for w in weights * turns])
            until = time.perf_counter() + 0.02  # under load, until clocks have risen
            while time.perf_counter() < until:
                replay.sample()
            found[name, bits] = statistics.median(replay.sample() for _ in range(7)) / 1e3
            replay.close()
    return found


def _row(label: str, m: int, replay: Replay, size: int) -> dict[str, Any]:
    """The time of a whole graph."""
    replay.sample()
    samples = [replay.sample() * 4 * BLOCKS for _ in range(9)]
    replay.close()
    return {"stack": label, "m": m, "bytes": size, **spread(samples)}


def tuning(result: dict[str, Any]) -> None:
    """Stacks of one width under other tunings than those shipped: single launches mislead."""
    entry = [
        entries.stream(torch.bfloat16, 1, ((bits, 1, False),), how)
        for how, bits in itertools.product(TUNINGS, WIDTHS)
    ]
    compiled(entry)
    shipped = dict(launches.TUNED)
    for how in TUNINGS:
        launches.TUNED.update({(1, bits): how for bits in WIDTHS})
        launches.tuning_for.cache_clear()
        single = _singles(1)
        xs = {k: random_input(1, k, torch.bfloat16) for _, k in SHAPES.values()}
        for bits in WIDTHS:
            drawn = [_drawn(name, bits) for _ in range(BLOCKS) for name in SHAPES]
            weights = [Fused(weight.shapes, weight.data.clone()) for weight in drawn]
            torch.cuda.synchronize()
            replay = Replay([partial(matmul_overlapping, xs[w.columns], w) for w in weights])
            row = _row(f"uniform-{bits}", 1, replay, sum(w.nbytes for w in weights))
            row["tuning"] = [how.warps, how.stages, how.resident]
            row["single_us"] = {name: round(single[name, bits], 2) for name in SHAPES}
            row["predicted_us"] = round(BLOCKS * sum(row["single_us"].values()), 1)
            result["rows"].append(row)
            print({k: row[k] for k in ("tuning", "stack", "us", "predicted_us")}, flush=True)
            del weights
    launches.TUNED.update(shipped)
    launches.tuning_for.cache_clear()


def segments(result: dict[str, Any]) -> None:
    """Several widths in one launch against a launch for each."""
    sets: dict[str, list[Part]] = {
        "qkv 4+8+2": [(4096, 4, 128, True), (1024, 8, 128, True), (1024, 2, 128, True)],
        "qkv 3+6+5": [(4096, 3, 128, True), (1024, 6, 128, True), (1024, 5, 128, True)],
        "qkv 4+4+4": [(4096, 4, 128, True), (1024, 4, 128, True), (1024, 4, 128, True)],
        "gate_up 3+5": [(14336, 3, 128, True), (14336, 5, 128, True)],
        "gate_up 4+4": [(14336, 4, 128, True), (14336, 4, 128, True)],
        "gate_up 2+8": [(14336, 2, 128, True), (14336, 8, 128, True)],
    }
    for name, parts in sets.items():
        for m in (1, 16):
            x = random_input(m, 4096, torch.bfloat16)
            whole = rotated(random_fused(parts, 4096))
            apart = [rotated(random_fused([part], 4096)) for part in parts]
            row: dict[str, Any] = {"segments": name, "m": m, "bytes": whole[0].nbytes}
            row["one"] = _timed(x, [[weight] for weight in whole])
            each = [list(weights) for weights in zip(*apart, strict=False)]
            row["apart"] = _timed(x, each)
            result["rows"].append(row)
            print(name, m, row["one"]["us"], row["apart"]["us"], flush=True)


def _timed(x: torch.Tensor, turns: list[list[Fused]]) -> dict[str, float]:
    """Microseconds of one turn, each of which launches all of its matrices."""
    runs: list[Callable[[], object]] = [
        partial(matmul_overlapping, x, weight)
        for turn in turns * max(1, 24 // len(turns))
        for weight in turn
    ]
    replay = Replay(runs)
    replay.sample()
    found = spread([replay.sample() * len(turns[0]) for _ in range(7)])
    replay.close()
    return found
