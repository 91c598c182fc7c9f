"""Random matrices in device form, to test and time kernels on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitsearch.kernels.fused import Fused, fuse
from bitsearch.kernels.planes import Planes, pack

Part = tuple[int, int, int | None, bool]  # rows, bits, columns of a group, symmetric


def random_planes(part: Part, columns: int, random: torch.Generator) -> Planes:
    """Uniform codes, and scales that give rows of about unit length."""
    rows, bits, size, symmetric = part
    groups, device = -(-columns // (size or columns)), random.device
    codes = torch.randint(
        2**bits, (rows, columns), dtype=torch.uint8, device=device, generator=random
    )
    scales = torch.rand(rows, groups, device=device, generator=random).add_(0.5)
    scales.mul_(4 / 2**bits / columns**0.5)
    zeros = torch.randint(2**bits, scales.shape, dtype=torch.uint8, device=device, generator=random)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return pack(codes, scales.half(), zeros, bits, size, symmetric)


def random_fused(parts: Sequence[Part], columns: int, seed: int = 0, device: str = "cpu") -> Fused:
    """Segments of random matrices."""
    random = torch.Generator(device).manual_seed(seed)
    return fuse([random_planes(part, columns, random) for part in parts])


def random_input(
    m: int, columns: int, dtype: torch.dtype, seed: int = 1, device: str = "cpu"
) -> Tensor:
    """(m, columns) of mean 0 and variance 1."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(m, columns, device=device, generator=random).to(dtype)


def error(got: Tensor, weight: Fused, x: Tensor, bias: Tensor | None = None) -> float:
    """‖got − want‖ / ‖want‖, where want is the float64 product with the dequantized weights."""
    want = x.double() @ weight.dequantize().double().T
    if bias is not None:
        want += bias.double()
    return float((got.double() - want).norm() / want.norm())
