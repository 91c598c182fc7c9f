"""The device source on the host, thread by thread, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from bitsearch.kernels.emulation import (
    FEW,
    Case,
    Emulator,
    batch_case,
    dequantize_case,
    stream_case,
    token_case,
)
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.planes import dequantize
from bitsearch.kernels.random_planes import Part, error, random_fused, random_input

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = tuple(LIMIT)
# What is run, and what the output is compared with.
Checked = tuple[Case, Fused, Tensor, Tensor | None]


def test_every_width_and_type(emulator: Emulator) -> None:
    cases: list[Checked] = []
    for number, (part, dtype) in enumerate(itertools.product(FEW, DTYPES)):
        weight = random_fused([part], 300, number)
        cases.append(_stream(weight, (1, 3, 8, 9, 16)[number % 5], dtype))
    _check(emulator, cases)


def test_segments_of_all_widths_share_a_launch(emulator: Emulator) -> None:
    weight = random_fused(FEW, 700)
    bias = random_input(1, weight.rows, torch.float16, 5)[0]
    x = random_input(5, 700, torch.float16)
    _check(emulator, [(stream_case(weight, x, bias), weight, x, bias)])


def test_more_rows_than_a_warp_streams(emulator: Emulator) -> None:
    weight = random_fused([FEW[2], (270, 8, None, True), FEW[5]], 304)
    bias = random_input(1, weight.rows, torch.bfloat16, 5)[0]
    cases: list[Checked] = []
    for m, processors in ((17, 1), (70, 8)):
        x = random_input(m, 304, torch.bfloat16)
        cases.append((batch_case(weight, x, bias, processors=processors), weight, x, bias))
    _check(emulator, cases)


def test_bytes_times_bytes_are_exact_but_for_the_last_rounding(emulator: Emulator) -> None:
    weight, x = random_fused(FEW[3:6], 300), random_input(33, 300, torch.float16)
    x[4] = 0
    stored = emulator([token_case(x)])[0]
    scales = x.float().abs().amax(1) / 127
    codes = torch.where(scales[:, None] > 0, torch.round(x.float() * (1 / scales[:, None])), 0)
    padded = torch.nn.functional.pad(codes, (0, stored.shape[1] - 300)).unflatten(1, (-1, 4))
    assert torch.equal(stored.float(), padded[:, :, [0, 2, 1, 3]].flatten(1))
    case = batch_case(weight, stored, scales=scales, dtype=torch.float16)
    got = emulator([case])[0]
    want = codes.double() * scales[:, None].double() @ weight.dequantize().double().T
    assert (got.double() - want).norm() < 4e-4 * want.norm()


@pytest.mark.parametrize("backwards", [False, True])
def test_ranges_of_columns_meet_in_any_order_of_blocks(emulator: Emulator, backwards: bool) -> None:
    weight = random_fused([FEW[0], FEW[5]], 1500)
    x = random_input(9, 1500, torch.bfloat16)
    case = stream_case(weight, x, processors=11, backwards=backwards)
    assert case.numbers[5] > 1
    _check(emulator, [(case, weight, x, None)])


def test_one_row_of_one_column(emulator: Emulator) -> None:
    cases: list[Checked] = []
    for rows, columns in ((1, 1), (1, 129), (17, 8), (16, 127)):
        weight = random_fused([(rows, 8, None, True)], columns)
        cases.append(_stream(weight, 2, torch.float16))
    _check(emulator, cases)


def test_unit_vectors_give_columns_bit_by_bit(emulator: Emulator) -> None:
    cases, columns = [], []
    for part, dtype in itertools.product((FEW[0], FEW[2], FEW[5], FEW[7]), DTYPES):
        weight = random_fused([part], 200, part[1])
        x = torch.zeros(5, 200, dtype=dtype)
        x[torch.arange(5), torch.tensor([0, 63, 64, 127, 199])] = 1
        cases.append(stream_case(weight, x))
        columns.append(weight.dequantize()[:, [0, 63, 64, 127, 199]].T.to(dtype))
    for got, want in zip(emulator(cases), columns, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weights_are_rounded_once(emulator: Emulator, dtype: torch.dtype) -> None:
    for parts, columns in ((FEW, 296), (FEW[1:4], 77)):
        weight = random_fused(parts, columns)
        got = emulator([dequantize_case(weight, dtype)])[0]
        want = torch.cat([dequantize(part) for part in weight.segments()])
        assert torch.equal(got, want.to(dtype))


def test_calibration_kernels(emulator: Emulator) -> None:
    order = torch.arange(3)
    words = torch.randint(0, 2**31 - 1, (4 * 777,), dtype=torch.int32)
    poison = torch.full_like(words, -1)
    copied, read = emulator(
        [
            Case("copy", [], [order, words, poison]),
            Case("read", [0xFFFFFFFE], [order, words, torch.zeros(1, dtype=torch.int32)]),
        ]
    )
    assert torch.equal(copied, words)
    assert read.item() == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_shape(full_emulator: Emulator, bits: int, dtype: torch.dtype) -> None:
    cases: list[Checked] = []
    kinds = itertools.product((32, 64, 128, 256, None), (False, True))
    for number, (size, symmetric) in enumerate(kinds):
        for m in (1, 2, 7, 8, 15, 16):
            rows, columns = ((37, 300), (16, 1024), (5, 77))[(number + m) % 3]
            weight = random_fused([(rows, bits, size, symmetric)], columns, number)
            cases.append(_stream(weight, m, dtype))
        x = random_input(20 + number, 304, dtype)
        weight = random_fused([(300, bits, size, symmetric)], 304, number)
        cases.append((batch_case(weight, x), weight, x, None))
    _check(full_emulator, cases)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_of_segments(full_emulator: Emulator, seed: int) -> None:
    random = Random(seed)
    parts: list[Part] = [
        (
            random.choice((1, 5, 16, 30, 48)),
            random.randint(1, 8),
            random.choice((32, 64, 128, None)),
            random.random() < 0.5,
        )
        for _ in range(random.choice((1, 3, 8)))
    ]
    weight = random_fused(parts, random.choice((64, 250, 1024, 1500)), seed)
    dtype = DTYPES[seed % 2]
    bias = random_input(1, weight.rows, dtype, 9)[0]
    x = random_input(1 + seed % 16, weight.columns, dtype)
    case = stream_case(weight, x, bias, processors=random.choice((1, 3, 40)))
    _check(full_emulator, [(case, weight, x, bias)])


def _stream(weight: Fused, m: int, dtype: torch.dtype) -> Checked:
    x = random_input(m, weight.columns, dtype)
    return stream_case(weight, x), weight, x, None


def _check(emulator: Emulator, cases: Sequence[Checked]) -> None:
    for got, (case, weight, x, bias) in zip(
        emulator([case for case, *_ in cases]), cases, strict=True
    ):
        assert got.isfinite().all(), case.name
        found = error(got, weight, x, bias)
        assert found < LIMIT[x.dtype], (case.name, weight.shapes, found)
