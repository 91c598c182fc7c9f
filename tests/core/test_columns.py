"""Columns kept in higher precision: which ones, in what bytes, and what they take up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_format
from bitsearch.formats.columns import ColumnsFormat
from bitsearch.quantizers import gptq
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.columns import Columns
from bitsearch.quantizers.feedback import output_errors
from bitsearch.quantizers.rtn import quantize
from bitsearch.quantizers.second_moment import SecondMoment

NAMES = [
    "int3-g16+fp16x4", "int3-g16-fz+fp16x4", "int4-row-sym+fp16x5%", "int4-g32-sym+int8x8",
    "lut2-row+fp16x3", "nf4-g16+int8x10%", "nvfp4+fp16x1%", "mxfp4+int8x2", "dialect4-b32+fp16x2",
    "int3-g16-s3+fp16x2",
]  # fmt: skip


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int) -> SecondMoment:
    """Inputs whose columns hang together and differ in size."""
    mixing = normal(columns, columns, seed) * torch.logspace(0, -2, columns)[:, None]
    inputs = normal(2 * columns, columns, seed + 1) @ mixing
    return SecondMoment(inputs.mT @ inputs / len(inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_read_back_as_it_is_printed(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "int3-g16+fp16x0", "int3-g16+fp16", "int3-g16+fp16x0%", "int3-g16+fp16x1.0%", "+fp16x1",
        "int3-g16+int4x8", "bf16+fp16x4", "gguf-q4_k+fp16x4", "int3-g16+fp16x4+fp16x4",
        "int3-g16+fp16x100%", "int3-g16+fp16x.5%", "int3-g16+fp16x0.00001%", "int3-g16+",
    ],
)  # fmt: skip
def test_what_is_no_such_format_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown format"):
        parse_format(name)


def test_bytes_by_hand() -> None:
    """100 columns of 10 rows: 4 indices of 2 bytes, 4 columns of 2 bytes a weight, and 96
    columns of int3-g32: 36 bytes of codes, 3 scales of 2, 3 zero points in 2 bytes a row.
    In 8 bits: 4 weights and a scale of 2 bytes a row.
    """
    assert parse_format("int3-g32+fp16x4").bytes(10, 100) == 8 + 10 * (8 + 36 + 6 + 2)
    assert parse_format("int3-g32+fp16x3.1%").bytes(10, 100) == 8 + 10 * (8 + 36 + 6 + 2)
    assert parse_format("int3-g32+int8x4").bytes(10, 100) == 8 + 10 * (4 + 2 + 36 + 6 + 2)


@pytest.mark.parametrize(
    ("name", "columns", "fits"),
    [
        ("int3-g16+fp16x4", 4, False),
        ("int3-g16+fp16x4", 5, True),
        ("int3-g16+fp16x1%", 1, False),
        ("int3-g16+fp16x1%", 65_536, True),
        ("int3-g16+fp16x1%", 65_537, False),
    ],
)
def test_a_base_must_be_left_and_indices_must_fit(name: str, columns: int, fits: bool) -> None:
    assert parse_format(name).fits(columns) is fits


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(rows=st.integers(1, 5), columns=st.integers(20, 150), seed=st.integers(0, 2**31))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    name: str, rows: int, columns: int, seed: int
) -> None:
    format, weight = parse_format(name), normal(rows, columns, seed)
    encoded = quantize(weight, format, weight.square().mean(0))
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(rows, columns)
    back = codec_of(format).unpack(packed, format, columns)
    assert torch.equal(back.dequantize(), encoded.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_on_disk(tmp_path: Path, name: str) -> None:
    format, file = parse_format(name), tmp_path / "packed.safetensors"
    found = gptq.quantize(normal(33, 101, 0), format, None, correlated(101, 1))
    save_file(found.pack(), file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == format.bytes(33, 101)
    back = codec_of(format).unpack(load_file(file), format, 101)
    assert torch.equal(back.dequantize(), found.dequantize())


def kept_columns(weight: Tensor, name: str, h: Tensor | None) -> list[int]:
    """What a matrix keeps."""
    columns: list[int] = quantize(weight, parse_format(name), h).pack()["columns"].tolist()
    return columns


@pytest.mark.parametrize("statistics", [True, False])
def test_columns_are_those_that_lose_most(statistics: bool) -> None:
    """λ_j = h_j ‖w_j − ŵ_j‖², worked out weight by weight; h = 1 if inputs were not seen."""
    weight, h = normal(9, 60, 2), normal(1, 60, 3)[0].square() if statistics else torch.ones(60)
    rounded = quantize(weight, parse_format("int3-g16"), h).dequantize()
    scores = [
        sum(float(h[j]) * (float(weight[i, j]) - float(rounded[i, j])) ** 2 for i in range(9))
        for j in range(60)
    ]
    best = sorted(sorted(range(60), key=lambda j: -scores[j])[:5])
    for given_h in [h] if statistics else [None, torch.zeros(60)]:
        found = quantize(weight, parse_format("int3-g16+fp16x5"), given_h)
        assert found.pack()["columns"].tolist() == best


def test_kept_columns_are_exact_and_the_others_those_of_the_base() -> None:
    weight, h = normal(8, 70, 5).half().float(), torch.rand(70)
    format = parse_format("int3-g16+fp16x6")
    assert isinstance(format, ColumnsFormat)
    found = quantize(weight, format, h)
    columns = found.pack()["columns"].long()
    others = torch.tensor([j for j in range(70) if j not in columns.tolist()])
    assert torch.equal(found.dequantize()[:, columns], weight[:, columns])
    alone = quantize(weight[:, others], format.base, h[others]).dequantize()
    assert torch.equal(found.dequantize()[:, others], alone)


@pytest.mark.parametrize("kept", ["fp16", "int8"])
def test_more_columns_lose_less(kept: str) -> None:
    weight, moment = normal(48, 128, 6), correlated(128, 7)
    h = moment.matrix.diagonal()
    errors = [
        float(output_errors(weight, quantize(weight, parse_format(name), h), moment).sum())
        for name in ("int3-g32", *(f"int3-g32+{kept}x{count}" for count in (2, 8, 32, 96)))
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.25 * errors[0]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(rows=st.integers(1, 5), columns=st.integers(20, 100), seed=st.integers(0, 2**31))
def test_feedback_makes_no_row_worse(name: str, rows: int, columns: int, seed: int) -> None:
    weight, moment, format = normal(rows, columns, seed), correlated(columns, 8), parse_format(name)
    plain = quantize(weight, format, moment.matrix.diagonal())
    found = gptq.quantize(weight, format, moment.matrix.diagonal(), moment)
    after, before = (output_errors(weight, each, moment) for each in (found, plain))
    assert bool((after <= before).all())
    assert torch.equal(found.pack()["columns"], plain.pack()["columns"])


def test_kept_columns_take_up_the_errors_of_the_others() -> None:
    """The last step of optimal brain quantization: with what is rounded fixed, the float
    columns solve min Δ G Δᵀ, damped: Δ_k = −Δ_r G_rk (G_kk + λI)⁻¹.
    """
    weight, moment = normal(20, 64, 9), correlated(64, 10)
    found = gptq.quantize(weight, parse_format("int2-g16+fp16x8"), moment.matrix.diagonal(), moment)
    assert isinstance(found, Columns)
    rest, kept = found.place[:56], found.place[56:]
    error = (found.dequantize() - weight).double()
    g = moment.matrix.double()
    g.diagonal().add_(0.01 * float(g.diagonal().mean()))
    best = -error[:, rest] @ g[rest][:, kept] @ torch.linalg.inv(g[kept][:, kept])
    torch.testing.assert_close(error[:, kept], best, rtol=1e-2, atol=3e-3)
    assert float(best.abs().mean()) > 0.05


def test_weights_beyond_float16_are_refused() -> None:
    weight = normal(4, 64, 11)
    weight[:, 3] = 1e6
    with pytest.raises(BadInput, match=r"beyond float16.*--freeze"):
        quantize(weight, parse_format("mxfp8+fp16x2"))


@pytest.mark.parametrize("columns", [[5, 4], [5, 5], [5, 90]])
def test_damaged_indices_are_refused(columns: list[int]) -> None:
    format = parse_format("int3-g16+fp16x2")
    packed = quantize(normal(4, 64, 12), format).pack()
    packed["columns"] = torch.tensor(columns).to(torch.uint16)
    with pytest.raises(ValueError, match="in no order"):
        codec_of(format).unpack(packed, format, 64)
