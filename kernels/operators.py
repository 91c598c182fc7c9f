"""Products with fused integer matrices, as operators of torch.

`plane_matmul` is x·Wᵀ + bias: on a CUDA device the kernel for that many rows, on any other the
reference. `plane_matmul_int8` first rounds each row of x to signed bytes, and multiplies integers.
`plane_dequantize` is W in 16 bits. All run under torch.compile and in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.kernels import entries, launches
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.planes import Shape

STREAM_ROWS = 16  # most rows of x that the streaming kernel takes
# Measured on an H100: with more, dequantizing for the library's product is mostly faster.
BATCH_ROWS = 128


def matmul(
    x: Tensor,
    weight: Fused,
    bias: Tensor | None = None,
    *,
    integers: bool = False,
    overlap: bool = False,
) -> Tensor:
    """x·Wᵀ (+ bias), of the type of x.

    Args:
        x: (…, columns) float16 or bfloat16 on a CUDA device; any float type elsewhere.
        weight: the fused matrix, on the device of x.
        bias: (rows,) of the type of x, or None.
        overlap: the kernel may read the weight before the kernel before it has ended, which
            hides the start of a launch; the weight must have been finished and waited for.
        integers: round each row of x to 255 levels, symmetric about zero, first.

    Raises:
        BadInput: shapes, types or devices do not match.
    """
    if x.shape[-1] != weight.columns:
        raise BadInput(f"inputs have {x.shape[-1]} features, the weight {weight.columns}")
    if x.device != weight.data.device:
        raise BadInput(f"inputs are on {x.device}, the weight on {weight.data.device}")
    if x.is_cuda and x.dtype not in entries.TYPES:
        raise BadInput(f"kernels take float16 and bfloat16, not {x.dtype}")
    operator = (
        torch.ops.bitsearch.plane_matmul_int8 if integers else torch.ops.bitsearch.plane_matmul
    )
    flat = x.reshape(-1, weight.columns)
    out: Tensor = operator(flat, weight.data, shape_list(weight.shapes), bias, overlap)
    return out.view(*x.shape[:-1], weight.rows)


def dequantize(weight: Fused, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of a 16-bit type, each weight rounded once."""
    out: Tensor = torch.ops.bitsearch.plane_dequantize(
        weight.data, shape_list(weight.shapes), dtype
    )
    return out


def shape_list(shapes: Sequence[Shape]) -> list[int]:
    """Shapes as the integers that operators take."""
    return [
        value
        for shape in shapes
        for value in (shape.bits, shape.group, int(shape.symmetric), shape.rows, shape.columns)
    ]


def _fused(data: Tensor, values: Sequence[int]) -> Fused:
    shapes = tuple(
        Shape(bits, group, bool(symmetric), rows, columns)
        for bits, group, symmetric, rows, columns in zip(*[iter(values)] * 5, strict=True)
    )
    return Fused(shapes, data)


def kernel_of(m: int) -> str:
    """The kernel for m rows of x: `stream`, `batch` or `dequantize`."""
    if m <= STREAM_ROWS:
        return "stream"
    return "batch" if m <= BATCH_ROWS else "dequantize"


@torch.library.custom_op("bitsearch::plane_matmul", mutates_args=())
def plane_matmul(
    x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None, overlap: bool
) -> Tensor:
    """The reference: float32 products with the dequantized weights."""
    out = x.float() @ _fused(data, shapes).dequantize().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


@plane_matmul.register_fake
def _(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None, overlap: bool) -> Tensor:
    return x.new_empty(x.shape[0], sum(shapes[3::5]))


@plane_matmul.register_kernel("cuda")
def _(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None, overlap: bool) -> Tensor:
    weight = _fused(data, shapes)
    m, columns = x.shape
    if kernel_of(m) == "dequantize":
        return torch.nn.functional.linear(x, launches.dequantize(weight, x.dtype), bias)
    if m > STREAM_ROWS and columns % 8:
        x = torch.nn.functional.pad(x, (0, 8 - columns % 8))
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    out = x.new_empty(m, weight.rows)
    if m > STREAM_ROWS:
        launches.batch(x, weight, bias, out, overlap=overlap)
    elif m:
        tuning = launches.tuning_for(weight.shapes, m, x.device.index)
        launches.stream(x, weight, bias, out, tuning, overlap)
    return out


@torch.library.custom_op("bitsearch::plane_matmul_int8", mutates_args=())
def plane_matmul_int8(
    x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None, overlap: bool
) -> Tensor:
    """The reference: rows of x rounded to scale · (−127 … 127), products in float32."""
    rows = x.float()
    scales = rows.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scales > 0, torch.round(rows * (1 / scales)), 0)
    out = codes @ _fused(data, shapes).dequantize().T * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


@plane_matmul_int8.register_fake
def _(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None, overlap: bool) -> Tensor:
    return x.new_empty(x.shape[0], sum(shapes[3::5]))


@plane_matmul_int8.register_kernel("cuda")
def _(x: Tensor, data: Tensor, shapes: Sequence[int], bias: Tensor | None, overlap: bool) -> Tensor:
    weight = _fused(data, shapes)
    out = x.new_empty(x.shape[0], weight.rows)
    if x.shape[0]:
        rounded, scales = launches.tokens(x if x.stride(-1) == 1 else x.contiguous())
        launches.batch(rounded, weight, bias, out, scales, overlap)
    return out


@torch.library.custom_op("bitsearch::plane_dequantize", mutates_args=())
def plane_dequantize(data: Tensor, shapes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The reference: float32, rounded once."""
    return _fused(data, shapes).dequantize().to(dtype)


@plane_dequantize.register_fake
def _(data: Tensor, shapes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return data.new_empty(sum(shapes[3::5]), shapes[4], dtype=dtype)


@plane_dequantize.register_kernel("cuda")
def _(data: Tensor, shapes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return launches.dequantize(_fused(data, shapes), dtype)
