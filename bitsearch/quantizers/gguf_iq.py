"""Encoders of ggml's IQ4 types: four-bit codes that name the entries of one fixed table.

    iq4_nl   w ≈ d · v(q)         blocks of 32, d float16
    iq4_xs   w ≈ d · s · v(q)     super-blocks of 256 with 8 scales s of 6 bits, −32 to 31

The table v is uneven and not symmetric, so that scales of both signs are tried, of a
block's largest weight at either end of the table and a little beyond, and the best is
refitted by least squares. Layouts: ggml's `block_iq4_nl` and `block_iq4_xs`; the `gguf`
library reads them back in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Encoder = Callable[[Tensor, Tensor], Tensor]

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_SHARES = (1.2, 1.1, 1.0, 0.92, 0.85, 0.78)
_REFITS = 2


def _codes(weight: Tensor, step: Tensor) -> Tensor:
    """(…, n) codes of the entries nearest to weight / step; where the step is 0, of the 1."""
    table = torch.tensor(VALUES, dtype=torch.float32, device=weight.device)
    borders = (table[1:] + table[:-1]) / 2
    return torch.bucketize(torch.where(step != 0, weight / step, 1.0), borders)


def _decoded(codes: Tensor) -> Tensor:
    return torch.tensor(VALUES, dtype=torch.float32, device=codes.device)[codes]


def _steps(weight: Tensor, h: Tensor) -> Tensor:
    """(…, 1) float16 steps d of (…, 32) weights with the least Σ h (w − d·v)²."""
    place = weight.abs().argmax(-1, keepdim=True)
    largest = weight.gather(-1, place)
    best = torch.full_like(largest, torch.inf)
    found = torch.zeros_like(largest)

    def keep_better(step: Tensor) -> None:
        nonlocal best, found
        step = step.half().float()
        error = _decoded(_codes(weight, step)).mul_(step).sub_(weight).square_().mul_(h)
        total = error.sum(-1, keepdim=True)
        better = total < best
        best, found = torch.where(better, total, best), torch.where(better, step, found)

    for end in (VALUES[0], VALUES[-1]):
        for share in _SHARES:
            keep_better(largest * (share / end))
    for _ in range(_REFITS):
        values = _decoded(_codes(weight, found))
        fitted = (h * weight * values).sum(-1, keepdim=True)
        keep_better(fitted / (h * values * values).sum(-1, keepdim=True).clamp(min=2.0**-40))
    return found


def _nibbles(codes: Tensor) -> Tensor:
    """(…, 32) codes -> (…, 16) bytes: low halves first columns, high halves the others."""
    return (codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8)


def _halves(value: Tensor) -> Tensor:
    """(blocks, 1) float32 -> (blocks, 2) bytes of the float16."""
    return value.half().contiguous().view(torch.uint8)


def iq4_nl(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 32) weights -> (blocks, 18) bytes."""
    step = _steps(weight, h)
    return torch.cat([_halves(step), _nibbles(_codes(weight, step))], 1)


def iq4_xs(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 256) weights -> (blocks, 136) bytes."""
    parts = weight.reshape(-1, 8, 32)
    steps = _steps(parts, h.reshape(-1, 8, 32))[..., 0]
    # the largest becomes −32: scales reach one step further down than up
    largest = steps.gather(1, steps.abs().argmax(1, keepdim=True))
    d = (-largest / 32).half().float()
    scales = torch.where(d != 0, torch.round(steps / d), 0.0).clamp_(-32, 31)
    codes = _codes(parts, (d * scales)[..., None])
    six = (scales + 32).int()
    low = (six[:, ::2] & 15) | (six[:, 1::2] & 15) << 4
    high = ((six >> 4) << torch.arange(0, 16, 2, device=six.device)).sum(1, keepdim=True)
    return torch.cat(
        [
            _halves(d),
            (high & 255).to(torch.uint8),
            (high >> 8).to(torch.uint8),
            low.to(torch.uint8),
            _nibbles(codes).reshape(-1, 128),
        ],
        1,
    )


ENCODERS: Mapping[str, Encoder] = {"gguf-iq4_nl": iq4_nl, "gguf-iq4_xs": iq4_xs}
