"""Measures what a CUDA device can do: memory, steps from launch to launch, instructions."""

from __future__ import annotations

import ctypes
import statistics
from functools import partial

import torch

from bitsearch.kernels.driver import load
from bitsearch.kernels.replay import Replay

RATES = ("lop3", "shf", "prmt", "imad", "hfma2", "hfma2_bf16")
MATRIX_RATES = ("mma_half", "mma_bfloat")
ENTRY = """#include "calibrate.cuh"
extern "C" __global__ void empty() {}
extern "C" __global__ void copy(const Words4* from, Words4* to, long long count) {
    copy_words(from, to, count);
}
extern "C" __global__ void read(const Words4* from, u32* to, long long count, u32 never) {
    read_words(from, to, count, never);
}
extern "C" __global__ void mma_half(long long* clocks, float* out, int turns, u32 a, u32 b) {
    rate_mma<Half>(clocks, out, turns, a, b);
}
extern "C" __global__ void mma_bfloat(long long* clocks, float* out, int turns, u32 a, u32 b) {
    rate_mma<BFloat>(clocks, out, turns, a, b);
}
"""
_BYTES = 1 << 30
_TURNS = 2048


def calibrate(device: int, samples: int = 9) -> dict[str, float]:
    """Medians of a device.

    Returns:
        copy_gbps: bytes read and written a nanosecond, by a copy within the device.
        read_gbps: bytes read, writing nothing.
        launch_us: from one empty kernel of a graph to the next.
        gflops: of an 8192³ bfloat16 product of the library, on random numbers.
        rate_*: instructions a clock of one multiprocessor, of 32-bit lanes; of `mma_*`
            multiply-adds.
    """
    with torch.cuda.device(device):
        found = _memory(device, samples)
        found["launch_us"] = _launch(device, samples)
        found["gflops"] = _product(samples)
        for name in RATES:
            found[f"rate_{name}"] = _rate(device, f"rate_{name}", 8)
        for name in MATRIX_RATES:
            found[f"rate_{name}"] = _rate(device, name, 4 * 16 * 8 * 16 / 32)
    return found


def _memory(device: int, samples: int) -> dict[str, float]:
    data = torch.randint(256, (2 * _BYTES,), dtype=torch.uint8, device="cuda")
    grid = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    source, target = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(data.data_ptr() + _BYTES)
    count = ctypes.c_longlong(_BYTES // 16)
    copy = Replay(
        [partial(load(ENTRY, device, "copy").launch, grid, 512, 0, source, target, count)]
    )
    found = {"copy_gbps": 2 * _BYTES / statistics.median(copy.sample() for _ in range(samples))}
    copy.close()
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    args = (source, ctypes.c_void_p(out.data_ptr()), count, ctypes.c_uint(0xFFFFFFFE))
    read = Replay([partial(load(ENTRY, device, "read").launch, grid, 512, 0, *args)])
    found["read_gbps"] = _BYTES / statistics.median(read.sample() for _ in range(samples))
    read.close()
    return found


def _launch(device: int, samples: int) -> float:
    kernel = load(ENTRY, device, "empty")
    steps = Replay([partial(kernel.launch, 1, 32, 0)] * 200)
    found = statistics.median(steps.sample() for _ in range(samples)) / 1e3
    steps.close()
    return found


def _product(samples: int) -> float:
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
    product = Replay([lambda: left @ right])
    found = statistics.median(product.sample() for _ in range(samples))
    product.close()
    return 2 * size**3 / found


def _rate(device: int, name: str, operations: float) -> float:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    threads = 1024
    clocks = torch.zeros(processors, dtype=torch.int64, device="cuda")
    out = torch.zeros(processors * threads, dtype=torch.int32, device="cuda")
    args = (
        ctypes.c_void_p(clocks.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(_TURNS),
        ctypes.c_uint(0x3C013C01),
        ctypes.c_uint(0x3C003C02),
    )
    kernel = load(ENTRY, device, name)
    for _ in range(2):
        kernel.launch(processors, threads, 0, *args)
        torch.cuda.synchronize()
    return operations * _TURNS * threads / float(clocks.double().median())
