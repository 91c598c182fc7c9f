"""The device form of integer matrices: nothing is lost, and every byte is where it is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.kernels.fused import fuse
from bitsearch.kernels.planes import (
    COLUMNS,
    PLANES,
    ROWS,
    Planes,
    Shape,
    dequantize,
    device_group,
    of_quantized,
    pack,
    unpack,
)
from bitsearch.quantizers.rtn import quantize


@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_of_a_word_fill_it_and_do_not_overlap(bits: int) -> None:
    for plane in PLANES[bits]:
        bits_used = [
            (plane.offset(field) + half + bit) % 32
            for field in range(plane.fields)
            for half in (0, 16)
            for bit in range(plane.width)
        ]
        assert sorted(bits_used) == list(range(32))
    assert sum(plane.width for plane in PLANES[bits]) == bits


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    bits=st.integers(1, 8),
    size=st.sampled_from([32, 64, 96, 128, 256, None]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_device_form_is_a_bijection(
    rows: int, columns: int, bits: int, size: int | None, symmetric: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    groups = -(-columns // (size or columns))
    codes = torch.randint(2**bits, (rows, columns), generator=random, dtype=torch.uint8)
    scales = torch.randn(rows, groups, generator=random).half()
    zeros = torch.randint(2**bits, (rows, groups), generator=random, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    planes = pack(codes, scales, zeros, bits, size, symmetric)
    assert planes.data.numel() == planes.shape.nbytes
    got = unpack(planes)
    assert torch.equal(got[0], codes)
    wide = [part.repeat_interleave(size or columns, 1)[:, :columns] for part in (scales, zeros)]
    found = [
        part.repeat_interleave(planes.shape.group or columns, 1)[:, :columns] for part in got[1:]
    ]
    assert torch.equal(found[0], wide[0])
    assert torch.equal(found[1], wide[1])
    assert torch.equal(dequantize(planes), (codes.float() - wide[1].float()) * wide[0].float())
    again = pack(*got, bits, planes.shape.group or None, symmetric)
    assert again.shape == planes.shape
    assert torch.equal(again.data, planes.data)


@pytest.mark.parametrize("name", ["int2-g32", "int3-g64-sym", "int4-g128", "int7-row", "int8-g96"])
def test_a_quantized_matrix_keeps_its_values(name: str) -> None:
    weight = torch.randn(33, 192, generator=torch.Generator().manual_seed(1))
    quantized = quantize(weight, parse_format(name))
    assert torch.equal(dequantize(of_quantized(quantized)), quantized.dequantize())


def test_bytes_of_a_llama_projection() -> None:
    # 4 bits, and a float16 scale for 128 columns: 4.125 bits a weight, nothing else.
    assert Shape(4, 128, True, 4096, 4096).nbytes == 4096 * 4096 * (4 + 16 / 128) // 8
    assert Shape(3, 64, True, 1024, 4096).nbytes == 1024 * 4096 * (3 + 16 / 64) // 8
    # A zero point takes a byte, but a lone one in a tile two.
    assert Shape(4, 64, False, 4096, 4096).nbytes == 4096 * 4096 * (4 + 24 / 64) // 8
    assert Shape(4, 128, False, 4096, 4096).nbytes == 4096 * 4096 * (4 + 32 / 128) // 8
    assert Shape(8, 0, True, 16, 4096).nbytes == ROWS * (4096 + 2)
    assert Shape(2, 128, True, 17, 129).nbytes == 2 * ROWS * 2 * COLUMNS * (2 + 16 / 128) // 8


def test_what_no_kernel_takes_is_refused_in_one_line() -> None:
    assert device_group(256, 4096) == 128
    assert device_group(4096, 4096) == 0
    with pytest.raises(BadInput, match="groups of 48 columns have no kernel"):
        device_group(48, 4096)
    with pytest.raises(BadInput, match="columns cannot share a launch"):
        fuse([_one(64), _one(128)])
    with pytest.raises(BadInput, match="9 matrices in one launch"):
        fuse([_one(64)] * 9)


def test_fused_segments_come_back_one_by_one() -> None:
    parts = [_one(300, 5, 20), _one(300, 3, 40), _one(300, 8, 16)]
    whole = fuse(parts)
    assert whole.rows == 76
    for part, back in zip(parts, whole.segments(), strict=True):
        assert back.shape == part.shape
        assert torch.equal(back.data, part.data)
    assert torch.equal(whole.dequantize(), torch.cat([dequantize(part) for part in parts]))


def _one(columns: int, bits: int = 4, rows: int = 16) -> Planes:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return of_quantized(quantize(weight, parse_format(f"int{bits}-g64")))
