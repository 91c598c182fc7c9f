"""The host program of the kernels, and the cases that mutated or watched programs run."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from bitsearch.kernels.emulation import (
    FEW,
    Case,
    Emulator,
    batch_case,
    build,
    dequantize_case,
    stream_case,
    token_case,
)
from bitsearch.kernels.random_planes import error, random_fused, random_input

Build = Callable[..., Emulator]
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="session")
def build_emulator(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build` with the compiler that is here."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return lambda *flags, **source: build(
        compiler, tmp_path_factory.mktemp("emulator"), *flags, **source
    )


@pytest.fixture(scope="session")
def emulator(build_emulator: Build) -> Emulator:
    """One kind of each width, without sanitizers."""
    return build_emulator("-DFEW_KINDS")


@pytest.fixture(scope="session")
def full_emulator(build_emulator: Build) -> Emulator:
    """Every kind."""
    return build_emulator("-O1")


@pytest.fixture(scope="session")
def wrong() -> Callable[[Emulator], str]:
    """Runs cases that reach every line of every kernel; what is wrong, or ''."""
    return find_wrong


def find_wrong(emulator: Emulator) -> str:
    """Small launches with tails, ranges of columns, idle warps, poison all around."""
    half, bfloat = torch.float16, torch.bfloat16
    ragged, wide = random_fused(FEW[4:], 300, 1), random_fused(FEW[:2], 1504, 2)
    odd = random_fused(FEW[2:4], 77, 3)
    given = [
        (ragged, random_input(3, 300, half), None),
        (wide, random_input(9, 1504, bfloat), None),
        (odd, random_input(2, 77, half), random_input(1, odd.rows, half, 5)[0]),
    ]
    cases: list[Case] = [
        stream_case(w, x, b, processors=11 if w is wide else 2) for w, x, b in given
    ]
    # More tiles of a warp than are under way at once, of two widths.
    deep = random_fused(FEW[4:6], 1504, 8)
    given.append((deep, random_input(2, 1504, half), None))
    cases.append(stream_case(deep, given[-1][1], processors=1))
    flat = random_fused([FEW[6], (300, 8, None, True)], 312, 4)
    for x in (random_input(20, 312, half), random_input(41, 312, bfloat)):
        given.append((flat, x, None))
        cases.append(batch_case(flat, x, processors=6))
    long = random_fused(FEW[6:7], 1504, 7)
    given.append((long, random_input(20, 1504, bfloat), None))
    cases.append(batch_case(long, given[-1][1], processors=8))
    try:
        found = emulator(cases, timeout=60)
        for got, (weight, x, bias) in zip(found, given, strict=True):
            if not error(got, weight, x, bias) < LIMIT[x.dtype]:
                return f"error {error(got, weight, x, bias)} of {weight.shapes}"
        return _wrong_integers(emulator) or _wrong_weights(emulator)
    except (RuntimeError, TimeoutError) as failure:
        return str(failure) or type(failure).__name__


def _wrong_integers(emulator: Emulator) -> str:
    weight, x = random_fused(FEW[1:3], 300, 6), random_input(33, 300, torch.float16)
    bytes_ = emulator([token_case(x)], timeout=60)[0]
    scales = x.float().abs().amax(1) / 127
    codes = torch.round(x.float() / scales[:, None])
    padded = torch.nn.functional.pad(codes, (0, bytes_.shape[1] - 300))
    swapped = padded.unflatten(1, (-1, 4))[:, :, [0, 2, 1, 3]].flatten(1)
    if not (bytes_.float() - swapped).abs().max() <= 1:
        return "bytes of a token"
    case = batch_case(weight, bytes_, scales=scales, dtype=torch.float16)
    got = emulator([case], timeout=60)[0]
    values = bytes_.unflatten(1, (-1, 4))[:, :, [0, 2, 1, 3]].flatten(1)[:, :300]
    found = error(got, weight, values.float() * scales[:, None])
    return "" if found < LIMIT[torch.float16] else f"error {found} with integers"


def _wrong_weights(emulator: Emulator) -> str:
    for parts, columns in ((FEW, 296), (FEW[1:4], 77)):
        weight = random_fused(parts, columns)
        got = emulator([dequantize_case(weight, torch.float16)], timeout=60)[0]
        if not torch.equal(got, weight.dequantize().half()):
            return f"weights of {columns} columns"
    return ""
