"""Hadamard rotation of the residual stream and of the value heads, fused into the weights.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024,
sections 3 and 4 (stages 1a, and 1b for values); R₁ and R₂ of Liu et al., "SpinQuant",
ICLR 2025. The rotation is diag(±1)·H / √n with random signs and H a Hadamard matrix, by
Sylvester's and Paley's constructions. The rotations that need an operation at run time
(queries and keys, the input of the down projection) are not made.

Weights become nearly Gaussian, without outlying columns, and inputs alike in size. Where a
few residual channels are very large, as they are in many models, every column of a rotated
matrix then sees them, and rounding to nearest loses, whatever the weights gained; error
feedback takes them out again. On SmolLM2-135M in int3-g64, embedding and head at 16 bits,
KL goes from 0.73 to 2.21 with `rtn`, and from 0.63 to 0.58 with `gptq` (3,072 calibration and
3,072 held-out tokens): use it with a quantizer that feeds errors back. A tied head is
untied, which costs the bytes of an embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.models.preparation import Preparation
from bitsearch.preparations import Method, Scene
from bitsearch.preparations.rotation import head_size, rotated


def find(scene: Scene) -> Preparation:
    """Rotations of the residual stream, and of the value heads where their size allows."""
    generator = torch.Generator().manual_seed(scene.seed)
    width = scene.decoder.config.hidden_size
    residual = randomized(width, generator)
    if residual is None:
        raise BadInput(
            f"no Hadamard matrix of order {width} is known to bitsearch (Sylvester's and Paley's "
            "constructions); leave --prepare away"
        )
    size = head_size(scene)
    values = None if size is None else randomized(size, generator)
    return rotated("hadamard", scene, residual, values)


def randomized(order: int, generator: torch.Generator) -> Tensor | None:
    """(n, n) float32 orthogonal matrix diag(±1)·H / √n; None if no H is known."""
    found = hadamard(order)
    if found is None:
        return None
    signs = torch.randint(0, 2, (order, 1), generator=generator) * 2 - 1
    return (signs * found).float() / math.sqrt(order)


def hadamard(order: int) -> Tensor | None:
    """(n, n) matrix of ±1 with H Hᵀ = n I; None if no construction here gives one.

    The Kronecker product of one of Sylvester's, of order 2^k, and one of Paley's: q + 1
    for a prime q ≡ 3 (mod 4), 2 (q + 1) for a prime q ≡ 1 (mod 4).
    """
    power = order & -order
    while power:
        if (rest := _paley(order // power)) is not None:
            return torch.kron(_sylvester(power), rest)
        power //= 2
    return None


def _sylvester(order: int) -> Tensor:
    found = torch.ones(1, 1, dtype=torch.int64)
    while len(found) < order:
        found = torch.kron(torch.tensor([[1, 1], [1, -1]]), found)
    return found


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of that very order."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if _prime(order - 1) and (order - 1) % 4 == 3:
        core = _conference(order - 1)
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.int64)
    q = order // 2 - 1
    if order % 2 == 0 and _prime(q) and q % 4 == 1:
        twice, diagonal = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        unit = torch.eye(q + 1, dtype=torch.int64)
        return torch.kron(_conference(q), twice) + torch.kron(unit, diagonal)
    return None


def _conference(q: int) -> Tensor:
    """(q + 1, q + 1): 0 on the diagonal, ones around Jacobsthal's matrix χ(i − j)."""
    squares = {pow(x, 2, q) for x in range(1, q)}
    character = torch.tensor([0, *(1 if x in squares else -1 for x in range(1, q))])
    places = torch.arange(q)
    found = torch.ones(q + 1, q + 1, dtype=torch.int64)
    found[0, 0] = 0
    found[1:, 1:] = character[(places[:, None] - places) % q]
    return found


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


METHOD = Method("Hadamard rotation of residual stream and values, fused", find, True)
