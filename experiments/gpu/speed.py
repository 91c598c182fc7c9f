"""Times of single launches, in graphs, on weights that no cache holds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from weights import copies, random_fused, random_input

from bitsearch.kernels.fused import Fused
from bitsearch.kernels.operators import stream
from bitsearch.kernels.partition import Tuning
from bitsearch.kernels.random_planes import Part
from bitsearch.kernels.replay import Replay

ROTATION = 256 << 20  # bytes of weights before one comes again; five times the L2
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}


def loop(weights: list[Fused], m: int, dtype: torch.dtype, tuning: Tuning, overlap: bool) -> Replay:
    """One launch on each copy."""
    x = random_input(m, weights[0].columns, dtype)
    outs = [torch.empty(m, weights[0].rows, dtype=dtype, device="cuda") for _ in range(2)]
    turns = max(1, 24 // len(weights))
    launches: list[Callable[[], object]] = [
        partial(stream, x, weight, None, outs[i % 2], tuning, overlap)
        for i, weight in enumerate(weights * turns)
    ]
    return Replay(launches)


def spread(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and least, in microseconds."""
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {
        "us": round(median / 1e3, 3),
        "p25": round(low / 1e3, 3),
        "p75": round(high / 1e3, 3),
        "min": round(min(samples) / 1e3, 3),
        "n": len(samples),
    }


def rotated(weight: Fused) -> list[Fused]:
    """As many copies as fill the rotation."""
    return copies(weight, max(2, -(-ROTATION // weight.nbytes)))


TUNINGS = [
    Tuning(*values)
    for values in (
        (8, 4, 1), (8, 8, 1), (8, 4, 2), (8, 6, 2), (8, 3, 3), (16, 3, 1), (16, 4, 1),
        (16, 6, 1), (4, 8, 2), (4, 6, 3), (4, 4, 4), (4, 8, 4),
    )
]  # fmt: skip


def tuning(result: dict[str, Any]) -> None:
    """How the kernel is best built, by width, shape and rows of x."""
    dtype = torch.bfloat16
    cells = []
    for name, (rows, columns) in SHAPES.items():
        for bits in (4, 2, 8):
            part: Part = (rows, bits, 128, True)
            weights = rotated(random_fused([part], columns, bits))
            for m in (1, 16):
                tried = [(tuning, overlap) for tuning in TUNINGS for overlap in (False, True)]
                random.Random(0).shuffle(tried)
                for how, overlap in tried:
                    row: dict[str, Any] = {
                        "shape": name, "bits": bits, "m": m, "overlap": overlap,
                        "tuning": [how.warps, how.stages, how.resident],
                        "bytes": weights[0].nbytes,
                    }  # fmt: skip
                    try:
                        replay = loop(weights, m, dtype, how, overlap)
                    except Exception as error:
                        row["failed"] = f"{type(error).__name__}: {error}"
                    else:
                        replay.sample()
                        row |= spread([replay.sample() for _ in range(5)])
                        replay.close()
                    result["rows"].append(row)
                    cells.append(row)
                best = sorted(
                    (r["us"], r["tuning"], r["overlap"])
                    for r in cells
                    if "us" in r and (r["shape"], r["bits"], r["m"]) == (name, bits, m)
                )
                floor = weights[0].nbytes / 3.0e6
                print(
                    name, bits, m, f"bytes/3.0TB/s {floor:.2f} us", best[:4], best[-1], flush=True
                )
            del weights
