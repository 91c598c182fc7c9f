"""The host's arithmetic against what a GPU computed from the same operands."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bitsearch.kernels.emulation import Case, Emulator

RECORD = Path(__file__).parents[2] / "experiments" / "gpu" / "results" / "conformance.json"
FLOATS, EXACT = slice(0, 8), slice(8, 16)


def test_the_host_computes_what_a_gpu_did(emulator: Emulator) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    given = torch.tensor(record["given"], dtype=torch.int32)
    want = torch.tensor(record["got"], dtype=torch.int32)
    poison = torch.full_like(given, -1)
    got = emulator([Case("conformance", [], [torch.arange(1), given, poison])])[0]
    # Integers, fused multiply-adds and roundings bit by bit; the order in which a matrix unit
    # adds up floats is its own.
    assert torch.equal(got[:, EXACT], want[:, EXACT])
    floats = got[:, FLOATS].contiguous().view(torch.float32)
    wanted = want[:, FLOATS].contiguous().view(torch.float32)
    size = wanted.abs().amax()
    assert size > 1
    assert (floats - wanted).abs().amax() < 1e-6 * size
