"""Calibration, correctness against float64, and the vectors that the host is compared with."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from speed import BATCHED
from torch import Tensor
from weights import random_fused, random_input

from bitsearch.kernels import launches
from bitsearch.kernels.calibrate import calibrate
from bitsearch.kernels.driver import load
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.operators import dequantize, matmul
from bitsearch.kernels.random_planes import Part, error

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
CONFORMANCE = """#include "conformance.cuh"
extern "C" __global__ void entry(const u32* in, u32* out) { conformance(in, out); }
"""


def calibration(result: dict[str, Any]) -> None:
    """Memory, launches, instructions."""
    result["rows"] = [calibrate(0)]
    print(result["rows"][0], flush=True)


def correctness(result: dict[str, Any]) -> None:
    """Every width, group, symmetry, type and number of rows; ragged shapes; mixed segments."""
    sizes: tuple[int | None, ...] = (32, 64, 128, None)
    for bits, size, symmetric in itertools.product(range(1, 9), sizes, (True, False)):
        counts = [1, 2, 7, 8, 15, 16, 300]
        groups = 0 if size is None else 128 // size
        name = f"int{bits}-{size}-{symmetric}"
        # Items that warps share, in every part of a warp.
        weight = random_fused([(6160, bits, size, symmetric)], 1100, bits)
        _check(result, weight, [1, 16], tuple(LIMIT), name)
        for rows, columns in ((1040, 4096), (37, 300)):
            weight = random_fused([(rows, bits, size, symmetric)], columns, bits)
            _check(result, weight, counts, tuple(LIMIT), name)
            if (groups, not symmetric) in BATCHED:
                _check(result, weight, [17, 40, 64, 200], (torch.bfloat16,), name)
                _check(result, weight, [40, 130], (torch.float16,), name)
                _check_integers(result, weight, name)
    mixed: list[Part] = [(1030, 4, 128, True), (256, 3, 64, False), (520, 8, None, True)]
    mixed += [(77, 2, 32, False), (16, 5, 128, False), (5, 6, 64, True), (48, 7, 32, True)]
    for columns in (4096, 14336, 1100):
        weight = random_fused(mixed, columns, 5)
        _check(result, weight, [1, 5, 16, 33, 100], (torch.bfloat16,), "mixed", biased=True)
    errors = [row for row in result["rows"] if not row["ok"]]
    result["failures"] = len(errors)
    for dtype in ("float16", "bfloat16", "int8"):
        found = [row["error"] for row in result["rows"] if row["dtype"] == dtype]
        print(f"correctness {dtype}: {len(found)} cases, worst {max(found):.2e}", flush=True)
    print(f"correctness: {len(errors)} failed", errors[:5], flush=True)


def _check(
    result: dict[str, Any],
    weight: Fused,
    counts: list[int],
    dtypes: tuple[torch.dtype, ...],
    name: str,
    biased: bool = False,
) -> None:
    exact = weight.dequantize()
    for dtype in dtypes:
        rounded = dequantize(weight, dtype)
        same = torch.equal(rounded, exact.to(dtype))
        bias = random_input(1, weight.rows, dtype, 3)[0] if biased else None
        for m in counts:
            x = random_input(m, weight.columns, dtype, m)
            product = _batch if 16 < m <= 256 else matmul
            found = error(product(x, weight, bias), weight, x, bias)
            unit = _identity(weight, rounded, dtype, m) if m <= 256 else True
            row = {
                "name": name, "shape": [weight.rows, weight.columns],
                "dtype": str(dtype).removeprefix("torch."), "m": m, "error": found,
                "identity_exact": unit, "dequantize_exact": same,
                "ok": found <= LIMIT[dtype] and unit and same,
            }  # fmt: skip
            result["rows"].append(row)


def _batch(x: Tensor, weight: Fused, bias: Tensor | None) -> Tensor:
    """The batch kernel, also where the operator would take another."""
    out = torch.full((len(x), weight.rows), torch.nan, dtype=x.dtype, device="cuda")
    launches.batch(torch.nn.functional.pad(x, (0, -x.shape[1] % 8)), weight, bias, out)
    return out


def _check_integers(result: dict[str, Any], weight: Fused, name: str) -> None:
    """Inputs rounded as the reference rounds them, products in float64."""
    for m in (1, 17, 100):
        x = random_input(m, weight.columns, torch.bfloat16, m)
        got = matmul(x, weight, integers=True)
        scales = x.float().abs().amax(1, keepdim=True) / 127
        codes = torch.round(x.float() * (1 / scales))
        want = codes.double() @ weight.dequantize().double().T * scales.double()
        found = float((got.double() - want).norm() / want.norm())
        result["rows"].append(
            {
                "name": name, "shape": [weight.rows, weight.columns], "dtype": "int8", "m": m,
                "error": found, "ok": found <= LIMIT[torch.bfloat16],
            }
        )  # fmt: skip


def _identity(weight: Fused, rounded: Tensor, dtype: torch.dtype, m: int) -> bool:
    """Unit vectors give columns of the weight, bit by bit."""
    columns = torch.randint(weight.columns, (m,), device="cuda")
    x = torch.zeros(m, weight.columns, dtype=dtype, device="cuda")
    x[torch.arange(m), columns] = 1
    return torch.equal(matmul(x, weight), rounded[:, columns].T.contiguous())


def conformance(result: dict[str, Any]) -> None:
    """What every arithmetic primitive makes of random operands."""
    random = torch.Generator("cuda").manual_seed(0)
    given = torch.randint(-(2**31), 2**31, (4 * 32, 16), generator=random, device="cuda")
    # Ordinary numbers: neither infinite nor far apart in size.
    half, bfloat = (10, 12, 17), (7, 124, 131)
    places = ((0, 4, half), (8, 10, half), (4, 8, bfloat), (10, 12, bfloat))
    for first, last, (mantissa, low, high) in places:
        shape = (len(given), last - first, 2)
        sign = torch.randint(2, shape, generator=random, device="cuda") << 15
        exponent = torch.randint(low, high, shape, generator=random, device="cuda") << mantissa
        fraction = torch.randint(1 << mantissa, shape, generator=random, device="cuda")
        halves = sign | exponent | fraction
        given[:, first:last] = halves[..., 0] | halves[..., 1] << 16
    words = given.to(torch.int64).bitwise_and(0xFFFFFFFF)
    given = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    out = torch.zeros_like(given)
    kernel = load(CONFORMANCE, 0)
    kernel.launch(1, 128, 0, ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    torch.cuda.synchronize()
    result["given"] = given.tolist()
    result["got"] = out.tolist()


def sanitizer(result: dict[str, Any]) -> None:
    """memcheck and racecheck of small shapes, both at once."""
    script = Path(__file__).with_name("small.py")
    python = ("--error-exitcode", "9", sys.executable)
    tools = {
        tool: subprocess.Popen(
            ["compute-sanitizer", "--tool", tool, *python, str(script), *widths.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ,
        )
        for tool, widths in (("memcheck", "3 4"), ("racecheck", "4"))
    }
    try:
        for tool, process in tools.items():
            text, _ = process.communicate()
            row = {"tool": tool, "exit": process.returncode, "output": text[-1500:]}
            result["rows"].append(row)
            print(tool, process.returncode, text.strip()[-300:], flush=True)
    finally:
        for process in tools.values():
            process.kill()
