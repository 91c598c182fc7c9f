"""The Triton kernel in its interpreter against the reference: two implementations agree."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import itertools, torch
from bitsearch.kernels.random_planes import error, random_fused, random_input
from bitsearch.kernels.triton_matmul import matmul

limits = {torch.float16: 1e-3, torch.float32: 1e-6}
for bits, size in itertools.product(range(1, 9), (32, 64, 128, None)):
    symmetric = bool((bits + (size or 0) // 32) % 2)
    weight = random_fused([(37, bits, size, symmetric)], 300, bits)
    for m, dtype in ((1, torch.float32), (17, torch.float16)):
        x = random_input(m, 300, dtype)
        found = error(matmul(x, weight), weight, x)
        assert found < limits[dtype], (bits, size, symmetric, m, found)
weight = random_fused([(20, 3, 64, False), (16, 8, None, True), (5, 6, 32, False)], 260)
x = random_input(5, 260, torch.float32)
assert error(matmul(x, weight), weight, x) < 1e-6
print("agrees")
"""


def test_interpreter_agrees_with_the_reference() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: make test-kernels installs it")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "agrees", result.stderr[-2000:]
