"""Small shapes of every kernel, to be run under a sanitizer."""

from __future__ import annotations

import sys

import torch
from weights import random_fused, random_input

from bitsearch.kernels.operators import dequantize, matmul
from bitsearch.kernels.random_planes import error

for bits in map(int, sys.argv[1:]):
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 16, 40):
            symmetric = bits % 2 == 0
            weight = random_fused([(37, bits, 64, symmetric), (16, 4, None, True)], 1500, bits)
            x = random_input(m, 1500, dtype)
            assert error(matmul(x, weight), weight, x) < 1e-2, (bits, dtype, m)
            dequantize(weight, dtype)
        matmul(x, weight, integers=True)
torch.cuda.synchronize()
print("small shapes are right")
