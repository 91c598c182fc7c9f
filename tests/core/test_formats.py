"""Names of formats, and bytes that are those of the stored tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitsearch.errors import UsageError
from bitsearch.formats import BF16, FP16, Format, parse_format, parse_formats
from bitsearch.formats.integer import IntFormat
from bitsearch.quantizers.quantized import Quantized, pack_rows, unpack, unpack_rows

ints = st.builds(
    IntFormat,
    kind=st.just("int"),
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 300),
    symmetric=st.booleans(),
)
shapes = st.tuples(st.integers(1, 7), st.integers(1, 150))


@given(ints | st.sampled_from([BF16, FP16]))
def test_a_format_is_read_back_as_it_is_printed(format: Format) -> None:
    assert parse_format(format.name) == format


@pytest.mark.parametrize(
    "text, names",
    [
        ("int4-g128", "int4-g128"),
        ("int2..4-g64", "int2-g64 int3-g64 int4-g64"),
        ("int{3,4}-g64, bf16", "int3-g64 int4-g64 bf16"),
        ("int4-{g32,g64}-sym,fp16,", "int4-g32-sym int4-g64-sym fp16"),
        ("int{2,3}-{row,g32}", "int2-row int2-g32 int3-row int3-g32"),
        ("int3..4-g{64,128}", "int3-g64 int4-g64 int3-g128 int4-g128"),
        ("int8..8-row", "int8-row"),
    ],
)
def test_lists_expand(text: str, names: str) -> None:
    assert [format.name for format in parse_formats(text)] == names.split()


@pytest.mark.parametrize(
    "text",
    [
        "int1-g64", "int9-g64", "int04-g64", "int4", "int4-g0", "int4-g", "int4-g064",
        "int4-64", "int4-g64-asym", "INT4-g64", "bf16-g64", "int٤-g64", "nf4-row-g64", "nf5-g64",
        "mxfp4-g32", "",
        "int4-g64 int3-g64", f"int4-g{'9' * 5000}",
    ],
)  # fmt: skip
def test_bad_names_are_refused_with_what_can_be_written(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown format .*int4-g128"):
        parse_format(text)


@pytest.mark.parametrize(
    "text",
    [
        "int8..3-g64,bf16", "int2..99999999999-g64", "int{3,4-g64", "int4-g64}", "int{}-g64",
        "int4-g64,int{4,5}-g64", "{int4-g64", "int1..3-g64",
    ],
)  # fmt: skip
def test_bad_lists_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_formats(text)


@pytest.mark.parametrize("text", ["", " , ,"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no candidate format"):
        parse_formats(text)


@given(ints, shapes, st.integers(0, 2**32 - 1))
def test_packing_loses_nothing_and_weighs_what_the_format_says(
    format: Format, shape: tuple[int, int], seed: int
) -> None:
    quantized = _random(format, shape, seed)
    packed = quantized.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(*shape)
    back = unpack(packed, format, shape[1])
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert torch.equal(back.zeros, quantized.zeros)
    assert torch.equal(back.dequantize(), quantized.dequantize())


@given(
    st.integers(1, 8).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40),
        )
    )
)
def test_codes_are_stored_low_bit_first(case: tuple[int, list[int]]) -> None:
    bits, values = case
    number = sum(value << (bits * place) for place, value in enumerate(values))
    size = -(-len(values) * bits // 8)
    packed = pack_rows(np.array([values], np.uint8), bits)
    assert packed.tobytes() == number.to_bytes(size, "little")
    assert unpack_rows(packed, bits, len(values)).tolist() == [values]


@pytest.mark.parametrize("name", ["int3-g64", "int5-g32-sym", "int4-row", "int7-g128", "int2-g7"])
def test_bytes_are_those_of_the_stored_tensors(tmp_path: Path, name: str) -> None:
    format, shape = parse_format(name), (33, 1001)
    file = tmp_path / "packed.safetensors"
    save_file(_random(format, shape, 0).pack(), file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == format.bytes(*shape)
    assert torch.equal(
        unpack(load_file(file), format, shape[1]).dequantize(),
        _random(format, shape, 0).dequantize(),
    )


@given(shapes)
def test_sixteen_bit_formats_take_two_bytes_a_weight(shape: tuple[int, int]) -> None:
    stored = torch.zeros(shape, dtype=torch.bfloat16)
    assert BF16.bytes(*shape) == FP16.bytes(*shape) == stored.nbytes


def test_bytes_of_a_common_case() -> None:
    """4 bits, a 16-bit scale and a 4-bit zero point for each 128: 4.15625 bits a weight."""
    assert parse_format("int4-g128").bytes(4096, 4096) * 8 / 4096**2 == 4 + 16 / 128 + 4 / 128


def _random(format: Format, shape: tuple[int, int], seed: int) -> Quantized:
    """Arbitrary codes, scales and zero points of a shape."""
    rng = np.random.default_rng(seed)
    size = (shape[0], format.groups(shape[1]))
    middle = np.full(size, 2 ** (format.bits - 1))
    return Quantized(
        format,
        torch.from_numpy(rng.integers(0, 2**format.bits, shape).astype(np.uint8)),
        torch.from_numpy(rng.normal(size=size).astype(np.float16)),
        torch.from_numpy(
            (middle if format.symmetric else rng.integers(0, 2**format.bits, size)).astype(np.uint8)
        ),
    )
