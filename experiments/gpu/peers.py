"""Other libraries' kernels on the same shapes, in the same run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed import ROTATION, SHAPES, matmul_overlapping, spread
from torch.nn.functional import linear
from weights import random_fused, random_input

from bitsearch.kernels.replay import Replay

SECONDS = 40  # of one library
Make = Callable[[int, int, int], tuple[Callable[[torch.Tensor], object], int]]


def peers(result: dict[str, Any]) -> None:
    """cuBLAS, ours, torch int4, bitsandbytes, Humming, GemLite."""
    makers: dict[str, tuple[tuple[int, ...], Make]] = {
        "cublas-bf16": ((16,), _cublas),
        "ours": ((2, 3, 4, 8), _ours),
        "torch-int4": ((4,), _torch_int4),
        "bitsandbytes-nf4": ((4,), _bitsandbytes),
        "humming": ((2, 3, 4), _humming),
        "gemlite": ((4, 2, 8), _gemlite),
    }
    for peer, (widths, make) in makers.items():
        start = time.perf_counter()
        for shape, (rows, columns) in SHAPES.items():
            for bits in widths:
                if time.perf_counter() - start > SECONDS:
                    break
                try:
                    _measure(result, peer, shape, rows, columns, bits, make)
                except Exception as error:
                    row = {"peer": peer, "shape": shape, "bits": bits}
                    result["rows"].append(row | {"failed": f"{type(error).__name__}: {error}"})
                    print(peer, shape, bits, type(error).__name__, str(error)[:300], flush=True)
                    if shape == "qkv" and bits == widths[0]:
                        traceback.print_exc()
                    break
            torch.cuda.empty_cache()


def _measure(
    result: dict[str, Any], peer: str, shape: str, rows: int, columns: int, bits: int, make: Make
) -> None:
    first, size = make(rows, columns, bits)
    count = min(32, max(2, -(-ROTATION // size)))
    made = [first, *(make(rows, columns, bits)[0] for _ in range(count - 1))]
    for m in (1, 16, 64, 256):
        x = random_input(m, columns, torch.bfloat16)
        try:
            replay = Replay([partial(run, x) for run in made * max(1, 24 // count)])
        except Exception as error:
            row = {"peer": peer, "shape": shape, "bits": bits, "m": m}
            result["rows"].append(row | {"failed": f"{type(error).__name__}: {error}"})
            print(peer, shape, bits, m, type(error).__name__, str(error)[:200], flush=True)
            torch.cuda.synchronize()
            continue
        replay.sample()
        row = {"peer": peer, "shape": shape, "bits": bits, "m": m, "bytes": size}
        row |= spread([replay.sample() for _ in range(5)])
        result["rows"].append(row)
        replay.close()
        print(row, flush=True)


def _cublas(rows: int, columns: int, _: int) -> tuple[Callable[[torch.Tensor], object], int]:
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    return lambda x: linear(x, weight), weight.nbytes


def _ours(rows: int, columns: int, bits: int) -> tuple[Callable[[torch.Tensor], object], int]:
    weight = random_fused([(rows, bits, 128, True)], columns, bits)
    return lambda x: matmul_overlapping(x, weight), weight.nbytes


def _torch_int4(rows: int, columns: int, _: int) -> tuple[Callable[[torch.Tensor], object], int]:
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, device="cuda").to(torch.bfloat16)
    size = packed.nbytes + scales.nbytes
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales), size


def _gemlite(rows: int, columns: int, bits: int) -> tuple[Callable[[torch.Tensor], object], int]:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(
        W_nbits=bits,
        group_size=128,
        in_features=columns,
        out_features=rows,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    codes = torch.randint(2**bits, (rows, columns), device="cuda", dtype=torch.uint8)
    scales = torch.rand(rows, columns // 128, device="cuda", dtype=torch.bfloat16)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    layer.pack(codes, scales, zeros, None)
    size = rows * columns * bits // 8 + 2 * scales.nbytes
    return layer.forward, size


def _humming(rows: int, columns: int, bits: int) -> tuple[Callable[[torch.Tensor], object], int]:
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=rows,
        shape_k=columns,
        weight_config={"dtype": f"int{bits}", "group_size": 128},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16))
    layer.transform()
    size = rows * columns * bits // 8 + 2 * rows * columns // 128
    return layer, size


def _bitsandbytes(rows: int, columns: int, _: int) -> tuple[Callable[[torch.Tensor], object], int]:
    import bitsandbytes as bnb

    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    data, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    size = data.nbytes + state.absmax.nbytes
    return lambda x: bnb.matmul_4bit(x, data.t(), quant_state=state), size
