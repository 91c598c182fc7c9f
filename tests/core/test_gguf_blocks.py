"""GGUF block types, decoded by the `gguf` library and through a real GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES

from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.formats.gguf import BLOCKS, GgufFormat
from bitsearch.quantizers.codec import codec_of
from bitsearch.quantizers.gguf_blocks import ggml_type
from bitsearch.quantizers.rtn import quantize


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_those_of_the_library(name: str) -> None:
    format = parse_format(name)
    assert isinstance(format, GgufFormat)
    weights, size = GGML_QUANT_SIZES[ggml_type(format)]
    assert format.bytes(3, 2 * weights) == 6 * size
    assert format.fits(weights) and not format.fits(weights + 16)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_gguf_file_holds_the_values_that_were_measured(name: str, tmp_path: Path) -> None:
    format = parse_format(name)
    encoded = quantize(normal(6, 512), format)
    packed = encoded.pack()
    assert sum(tensor.nbytes for tensor in packed.values()) == format.bytes(6, 512)
    assert torch.equal(
        codec_of(format).unpack(packed, format, 512).dequantize(), encoded.dequantize()
    )
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    kind = ggml_type(format)  # type: ignore[arg-type]
    writer.add_tensor("blk.0.attn_q.weight", packed["blocks"].numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert tensor.tensor_type == kind and tensor.n_bytes == format.bytes(6, 512)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(values, encoded.dequantize().numpy())


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gguf-q2_k", 0.105), ("gguf-q3_k", 0.024), ("gguf-q4_k", 0.0066),
        ("gguf-q5_k", 0.0016), ("gguf-q6_k", 0.00034), ("gguf-q4_0", 0.0080),
        ("gguf-q5_0", 0.0020), ("gguf-q8_0", 0.00003), ("gguf-mxfp4", 0.0140),
        ("gguf-iq4_nl", 0.0066), ("gguf-iq4_xs", 0.0066),
    ],
)  # fmt: skip
def test_distortion(name: str, most: float) -> None:
    """Unit-variance Gaussian weights: below rounding in groups of 32, above 4^−b."""
    format, weight = parse_format(name), normal(64, 2048, 1)
    error = float((quantize(weight, format).dequantize() - weight).square().mean())
    assert 4.0 ** (-8 * format.bytes(1, 2048) / 2048) < error < most


@pytest.mark.parametrize("name", BLOCKS)
def test_zeros_and_one_large_weight(name: str) -> None:
    weight = torch.zeros(2, 512)
    assert torch.equal(quantize(weight, parse_format(name)).dequantize(), weight)
    weight[1, 300] = -8.0
    found = quantize(weight, parse_format(name)).dequantize()
    assert found[1, 300] == pytest.approx(-8.0, rel=0.05) and torch.equal(found[0], weight[0])


@pytest.mark.parametrize(
    "name", ["gguf-q2_k", "gguf-q3_k", "gguf-q4_k", "gguf-iq4_nl", "gguf-iq4_xs"]
)
def test_importance_moves_the_error_to_other_columns(name: str) -> None:
    weight, importance = normal(64, 256, 2), torch.ones(256)
    importance[::8] = 100.0
    plain = (quantize(weight, parse_format(name)).dequantize() - weight).square()
    weighted = (quantize(weight, parse_format(name), importance).dequantize() - weight).square()
    assert weighted[:, ::8].mean() < 0.9 * plain[:, ::8].mean()


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(BadInput, match="whole blocks of 256"):
        quantize(normal(2, 576), parse_format("gguf-q4_k"))


@pytest.mark.parametrize("name", ["gguf-iq4_nl", "gguf-iq4_xs"])
def test_values_that_a_block_can_hold_are_kept(name: str) -> None:
    """Random blocks whose largest scale, and of each 32 weights the lowest entry, is in use."""
    format, rng = parse_format(name), np.random.default_rng(0)
    assert isinstance(format, GgufFormat)
    size = format.bytes(1, format.block)
    blocks = rng.integers(0, 256, (20, size), np.uint8)
    halves = rng.uniform(0.001, 0.1, 20).astype(np.float16)
    blocks[:, :2] = halves[:, None].view(np.uint8)
    if name == "gguf-iq4_xs":
        blocks[:, 2], blocks[:, 4] = blocks[:, 2] & 0xFC, blocks[:, 4] & 0xF0  # the first is −32
    blocks[:, size % 16 :: 16] &= 0xF0  # a code 0 among each 32
    values = gguf.quants.dequantize(blocks, ggml_type(format))
    found = quantize(torch.from_numpy(values), format)
    assert np.array_equal(found.dequantize().numpy(), values)
