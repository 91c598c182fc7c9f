"""Encoders of ggml's K types: super-blocks of 256 weights with quantized scales.

    q2_k, q4_k, q5_k:  w ≈ d·s·q − e·m     16 or 8 sub-blocks, d and e float16
    q3_k, q6_k:        w ≈ d·s·q           16 sub-blocks, q signed

Scales and ranges of sub-blocks come from the integer search of this package,
are rounded to their 4, 6 or 8 bits, and codes are chosen last, for the values
that the block really has. Layouts: ggml's `block_q*_K`; the `gguf` library reads
them back in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bitsearch.formats.integer import IntFormat
from bitsearch.quantizers import integer

Encoder = Callable[[Tensor, Tensor], Tensor]


def _halves(value: Tensor) -> Tensor:
    """(blocks, 1) float32 -> (blocks, 2) bytes of the float16."""
    return value.half().contiguous().view(torch.uint8)


def _ranges(weight: Tensor, h: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Scale and −minimum (both ≥ 0) of each sub-block: (blocks, 256 / size)."""
    found = integer.quantize(
        weight.reshape(1, -1), IntFormat("int", bits, size, False), h.reshape(-1)
    )
    scales = found.scales.float().reshape(len(weight), -1)
    lows = scales * found.zeros.float().reshape(len(weight), -1)
    return scales, lows


def _levels(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(blocks, n) ≥ 0 -> float16 steps (blocks, 1), and whole multiples up to `top`."""
    step = (values.amax(1, keepdim=True) / top).half().float()
    whole = torch.round(values / step.clamp(min=2.0**-24)).clamp_(0, top)
    return step, whole


def _affine(weight: Tensor, h: Tensor, bits: int, size: int, top: int) -> tuple[Tensor, ...]:
    """d, e (blocks, 1); s, m (blocks, n); codes (blocks, 256)."""
    scales, lows = _ranges(weight, h, bits, size)
    d, s = _levels(scales, top)
    e, m = _levels(lows, top)
    step = (d * s).repeat_interleave(size, 1)
    low = (e * m).repeat_interleave(size, 1)
    codes = torch.round((weight + low) / step.clamp(min=2.0**-40)).clamp_(0, 2**bits - 1)
    codes = torch.where(step > 0, codes, torch.zeros_like(codes))
    return d, e, s.to(torch.uint8), m.to(torch.uint8), codes.to(torch.uint8)


def _signed(weight: Tensor, h: Tensor, bits: int, top: int) -> tuple[Tensor, ...]:
    """d (blocks, 1); s (blocks, 16) within ±top; codes (blocks, 256) from 0."""
    found = integer.quantize(weight.reshape(1, -1), IntFormat("int", bits, 16, True), h.reshape(-1))
    scales = found.scales.float().reshape(len(weight), 16)
    d = (scales.abs().amax(1, keepdim=True) / top).half().float()
    s = torch.round(scales / d.clamp(min=2.0**-24)).clamp_(-top, top)
    step = (d * s).repeat_interleave(16, 1)
    half = 2 ** (bits - 1)
    codes = torch.where(step != 0, torch.round(weight / step), torch.zeros_like(weight))
    return d, s, (codes.clamp_(-half, half - 1) + half).to(torch.uint8)


def _six_bit_pairs(s: Tensor, m: Tensor) -> Tensor:
    """Eight 6-bit scales and minima in 12 bytes, as q4_k and q5_k have them."""
    first = (s[:, :4] & 63) | (s[:, 4:] >> 4 << 6)
    second = (m[:, :4] & 63) | (m[:, 4:] >> 4 << 6)
    third = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return torch.cat([first, second, third], 1)


def _two_bits(codes: Tensor) -> Tensor:
    """(blocks, 256) codes below 4 -> 64 bytes: each byte holds columns 32 apart."""
    parts = codes.reshape(-1, 2, 4, 32)
    return (
        parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    ).reshape(-1, 64)


def _nibbles(codes: Tensor) -> Tensor:
    """(blocks, 256) codes below 16 -> 128 bytes: low half columns 0–31 of each 64."""
    parts = codes.reshape(-1, 4, 2, 32)
    return (parts[:, :, 0] | parts[:, :, 1] << 4).reshape(-1, 128)


def _bit_planes(bits: Tensor) -> Tensor:
    """(blocks, 256) zeros and ones -> 32 bytes: bit k of byte j is column 32 k + j."""
    parts = bits.reshape(-1, 8, 32)
    return sum(parts[:, k] << k for k in range(1, 8)) + parts[:, 0]


def q2_k(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 256) weights -> (blocks, 84) bytes."""
    d, e, s, m, codes = _affine(weight, h, 2, 16, 15)
    return torch.cat([s | m << 4, _two_bits(codes), _halves(d), _halves(e)], 1)


def q3_k(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 256) weights -> (blocks, 110) bytes."""
    d, s, codes = _signed(weight, h, 3, 31)
    six = (s + 32).to(torch.uint8)
    low = (six[:, :8] & 15) | (six[:, 8:] & 15) << 4
    high = (six >> 4).reshape(-1, 4, 4)
    packed = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat([_bit_planes(codes >> 2), _two_bits(codes & 3), low, packed, _halves(d)], 1)


def q4_k(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 256) weights -> (blocks, 144) bytes."""
    d, e, s, m, codes = _affine(weight, h, 4, 32, 63)
    return torch.cat([_halves(d), _halves(e), _six_bit_pairs(s, m), _nibbles(codes)], 1)


def q5_k(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 256) weights -> (blocks, 176) bytes."""
    d, e, s, m, codes = _affine(weight, h, 5, 32, 63)
    pairs = _six_bit_pairs(s, m)
    return torch.cat(
        [_halves(d), _halves(e), pairs, _bit_planes(codes >> 4), _nibbles(codes & 15)], 1
    )


def q6_k(weight: Tensor, h: Tensor) -> Tensor:
    """(blocks, 256) weights -> (blocks, 210) bytes."""
    d, s, codes = _signed(weight, h, 6, 127)
    quarters = (codes & 15).reshape(-1, 2, 2, 64)  # columns l and l + 32, then l + 64 and l + 96
    low = (quarters[:, :, 0] | quarters[:, :, 1] << 4).reshape(-1, 128)
    signs = s.to(torch.int8).view(torch.uint8)
    return torch.cat([low, _two_bits(codes >> 4), signs, _halves(d)], 1)


ENCODERS: Mapping[str, Encoder] = {
    "gguf-q2_k": q2_k,
    "gguf-q3_k": q3_k,
    "gguf-q4_k": q4_k,
    "gguf-q5_k": q5_k,
    "gguf-q6_k": q6_k,
}
