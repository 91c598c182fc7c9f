"""Times of single launches, in graphs, on weights that no cache holds."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear
from weights import copies, random_fused, random_input

from bitsearch.kernels import entries, launches
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.nvrtc import compile_kernel
from bitsearch.kernels.operators import matmul
from bitsearch.kernels.partition import Tuning
from bitsearch.kernels.replay import Replay

ROTATION = 256 << 20  # bytes of weights before one comes again; five times the L2
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}


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


def kinds_entries() -> list[str]:
    """Entry points of `kinds`."""
    ways = itertools.product((2, 4, 8), (4, 8), (False, True))
    return [
        entries.batch(torch.bfloat16, cols, ((bits, 1, False),), integers)
        for bits, cols, integers in ways
    ]


def wanted() -> list[str]:
    """Entry points of `correctness`, to be compiled ahead."""
    found = []
    every = itertools.product(entries.TYPES, range(1, 9), (0, 1, 2, 4), (False, True))
    for dtype, bits, groups, zeros in every:
        kind = ((bits, groups, zeros),)
        for m in (1, 16):
            found.append(entries.stream(dtype, m, kind, _tuned(kind, m)))
        found.append(entries.dequantize(dtype, kind))
    for bits, (groups, zeros) in itertools.product(range(1, 9), BATCHED):
        kind = ((bits, groups, zeros),)
        for cols in (4, 8) if groups < 2 else (4,):
            found += [entries.batch(dtype, cols, kind) for dtype in entries.TYPES]
            found.append(entries.batch(torch.bfloat16, cols, kind, integers=True))
    return found


BATCHED = ((1, False), (2, True), (0, True), (4, False))  # scales in a tile, zero points


def followers() -> list[str]:
    """Entry points of `grid`, `stack`, `segments` and the tables."""
    found = []
    sets: list[tuple[entries.Kind, ...]] = [((bits, 1, False),) for bits in range(2, 9)]
    sets += [((2, 1, False), (4, 1, False), (8, 1, False)), ((2, 1, False), (8, 1, False))]
    sets += [((3, 1, False), (5, 1, False), (6, 1, False)), ((3, 1, False), (5, 1, False))]
    for kinds, m in itertools.product(sets, (1, 16)):
        found.append(entries.stream(torch.bfloat16, m, kinds, _tuned(kinds, m)))
    for bits in range(2, 9):
        grouped = ((bits, 2, True),)
        found.append(entries.stream(torch.bfloat16, 1, grouped, _tuned(grouped, 1)))
    return found


def _tuned(kinds: tuple[entries.Kind, ...], m: int) -> Tuning:
    """As `launches.tuning_of`."""
    if any(groups > 1 and zeros for _, groups, zeros in kinds):
        return launches.TUNED_GROUPED
    return launches.TUNED[-(-m // 8), max(bits for bits, *_ in kinds)]


def compile(result: dict[str, Any]) -> None:
    """Compile on all cores what the other steps want."""
    result["bytes"] = compiled([*wanted(), *kinds_entries(), *followers()])


def compiled(entry: list[str]) -> int:
    """Compile on all cores; bytes of machine code."""
    with ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        unique = list(dict.fromkeys(entry))
        return sum(map(len, pool.map(partial(compile_kernel, target="sm_90a"), unique)))


def grid(result: dict[str, Any]) -> None:
    """Every width, shape and number of rows, beside the library's bfloat16 product."""
    cases = [(name, bits) for name in (*SHAPES, "lm_head") for bits in (16, *range(2, 9))]
    for name, bits in random.Random(1).sample(cases, len(cases)):
        rows, columns = SHAPES.get(name, (128256, 4096))
        counts = (1, 4, 16, 64, 256, 2048) if name in SHAPES else (1, 16)
        runs: list[Callable[[torch.Tensor], object]]
        if bits == 16:
            dense = random_input(rows, columns, torch.bfloat16)
            size = dense.nbytes
            count = max(2, -(-ROTATION // size))
            runs = [partial(_swapped, linear, dense.clone()) for _ in range(count)]
        else:
            weights = rotated(random_fused([(rows, bits, 128, True)], columns, bits))
            size = weights[0].nbytes
            runs = [partial(_swapped, matmul_overlapping, weight) for weight in weights]
        for m in counts:
            x = random_input(m, columns, torch.bfloat16)
            turns = max(1, (24 if m <= 256 else 4) // len(runs))
            row: dict[str, Any] = {"shape": name, "bits": bits, "m": m, "bytes": size}
            try:
                replay = Replay([partial(run, x) for run in runs * turns])
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
            else:
                replay.sample()
                row |= spread([replay.sample() for _ in range(7)])
                replay.close()
            result["rows"].append(row)
    print_grid(result["rows"])


def kinds(result: dict[str, Any]) -> None:
    """The kernels for more than 16 rows of x beside each other: batch, dequantize, bytes."""
    compiled(kinds_entries())
    for (name, (rows, columns)), bits in itertools.product(SHAPES.items(), (2, 4, 8)):
        weights = rotated(random_fused([(rows, bits, 128, True)], columns, bits))
        for m in (1, 17, 32, 64, 128, 256, 2048):
            x = random_input(m, columns, torch.bfloat16)
            out = torch.empty(m, rows, dtype=torch.bfloat16, device="cuda")
            ways: dict[str, Callable[[Fused], object]] = {
                "bytes": partial(matmul, x, integers=True, overlap=True),
                "dequantize": lambda weight, x=x: linear(x, launches.dequantize(weight, x.dtype)),
            }
            if 16 < m <= 256:
                ways["batch"] = lambda weight, x=x, out=out: launches.batch(
                    x, weight, None, out, overlap=True
                )
            for kernel, way in ways.items():
                row: dict[str, Any] = {"shape": name, "bits": bits, "m": m, "kernel": kernel}
                turns = max(1, 24 // len(weights)) if m <= 256 else 1
                runs = weights * turns if m <= 256 else weights[:4]
                replay = Replay([partial(way, weight) for weight in runs])
                replay.sample()
                result["rows"].append(row | spread([replay.sample() for _ in range(5)]))
                replay.close()
    found = {(r["shape"], r["bits"], r["m"], r["kernel"]): r["us"] for r in result["rows"]}
    for name, bits in itertools.product(SHAPES, (2, 4, 8)):
        for kernel in ("batch", "dequantize", "bytes"):
            times = [found.get((name, bits, m, kernel)) for m in (1, 17, 32, 64, 128, 256, 2048)]
            print(f"{name} int{bits} {kernel}: {times}", flush=True)


def _swapped(product: Callable[..., object], weight: object, x: torch.Tensor) -> object:
    return product(x, weight)


def matmul_overlapping(x: torch.Tensor, weight: Fused) -> torch.Tensor:
    """A product that may begin before the kernel before has ended."""
    return matmul(x, weight, overlap=True)


def print_grid(rows: list[dict[str, Any]]) -> None:
    """Microseconds by shape and rows of x; one column a width."""
    found = {(r["shape"], r["m"], r["bits"]): r.get("us", -1) for r in rows}
    for shape, m in sorted({key[:2] for key in found}):
        line = " ".join(f"{found.get((shape, m, bits), -1):8.2f}" for bits in (*range(2, 9), 16))
        print(f"{shape:8s} m={m:5d} {line}", flush=True)
