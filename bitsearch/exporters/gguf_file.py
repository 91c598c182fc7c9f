"""Write a GGUF file whose codes are exactly those that were measured, and read its types.

Matrices are stored row by row in blocks, so moving rows (q and k of the Llama family) and
splitting stacks of experts moves bytes and changes no value. What no policy decides
(norms, biases, routers) is float32, as llama.cpp's own converter has it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from bitsearch.errors import BadInput
from bitsearch.exporters.gguf_header import ROPE_FACTORS, add_model
from bitsearch.exporters.gguf_names import Part, family_of, heads_of_rows, parts_of
from bitsearch.exporters.gguf_tokenizer import add_tokenizer
from bitsearch.formats import Format
from bitsearch.formats.gguf import GgufFormat
from bitsearch.quantizers.affine import Affine
from bitsearch.quantizers.gguf_blocks import Blocks
from bitsearch.quantizers.gguf_blocks import ggml_type as block_type
from bitsearch.quantizers.levelled import Levelled
from bitsearch.quantizers.quantized import Quantized

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.exporters.base import Checkpoint
    from bitsearch.quantizers.codec import Encoded
    from bitsearch.units import Matrix

_QUANTIZATION_VERSION = 2  # of ggml's block layouts
# Formats whose codes and scales a ggml type holds as they are.
_SAME_VALUES: Mapping[str, Type] = {
    "bf16": Type.BF16,
    "fp16": Type.F16,
    "int4-g32-sym": Type.Q4_0,
    "int5-g32-sym": Type.Q5_0,
    "int8-g32-sym": Type.Q8_0,
    "int4-g32-fz": Type.Q4_1,
    "int5-g32-fz": Type.Q5_1,
    "mxfp4": Type.MXFP4,
}


def holds(format: Format) -> bool:
    """Whether a ggml type holds exactly the values of a format."""
    return isinstance(format, GgufFormat) or format.name in _SAME_VALUES


def ggml_type(format: Format) -> Type:
    """The type that `holds` a format."""
    return block_type(format) if isinstance(format, GgufFormat) else _SAME_VALUES[format.name]


def write_gguf(path: Path, formats: Mapping[str, Format], checkpoint: Checkpoint) -> int:
    """Write a model with its quantized weights.

    Args:
        path: file to make.
        formats: of every matrix, each with a `ggml_type`.
        checkpoint: the model and its quantizer.

    Returns:
        Bytes of the tensors, as the file says; factors of rotary frequencies not counted.

    Raises:
        BadInput: the model's family, configuration or tokenizer is not known to llama.cpp.
    """
    model: Any = checkpoint.loaded.model
    layout = checkpoint.loaded.layout
    family = family_of(layout.model_type)
    names = [*checkpoint.matrices, *layout.kept]
    parts = parts_of(names, layout.model_type, len(layout.blocks))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    factors = add_model(writer, model.config)
    rows = model.get_input_embeddings().weight.shape[0]
    add_tokenizer(writer, checkpoint.loaded.tokenizer, rows)
    if factors is not None:
        writer.add_tensor(ROPE_FACTORS, factors)
    for name in layout.kept:
        value = model.get_parameter(name).detach().float().cpu()
        if value.dim() == 1 and name.endswith("norm.weight"):
            value = value + family.norm_offset
        order = _row_order(name, len(value), layout.model_type, model.config)
        for part in parts[name]:
            writer.add_tensor(
                part.name, value.numpy()[order] if order is not None else value.numpy()
            )
    for done, (name, matrix) in enumerate(checkpoint.matrices.items()):
        checkpoint.progress("quantizing", done, len(checkpoint.matrices))
        kind, blocks = _blocks(matrix, formats[name], checkpoint)
        order = _row_order(name, matrix.out_features, layout.model_type, model.config)
        blocks = blocks if order is None else blocks[:, order]
        _add_parts(writer, parts[name], blocks, kind)
    checkpoint.progress("quantizing", len(checkpoint.matrices), len(checkpoint.matrices))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(tensor.n_bytes for tensor in read_tensors(path) if tensor.name != ROPE_FACTORS)


def read_tensors(path: Path) -> list[gguf.ReaderTensor]:
    """The tensors of a GGUF file.

    Raises:
        BadInput: it is none, or it is damaged.
    """
    try:
        return gguf.GGUFReader(path).tensors
    except (LookupError, OSError, OverflowError, struct.error, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no GGUF file, or damaged: {error}") from error


def _add_parts(
    writer: gguf.GGUFWriter, parts: tuple[Part, ...], stored: NDArray[np.uint8], kind: Type
) -> None:
    """Add (count, rows, bytes) rows as one tensor, or as its two halves."""
    half = stored.shape[1] // 2
    for part in parts:
        rows = stored if part.half is None else stored[:, part.half * half :][:, :half]
        rows = rows[0] if len(rows) == 1 else rows
        writer.add_tensor(part.name, np.ascontiguousarray(rows), raw_dtype=kind)


def _row_order(name: str, rows: int, model_type: str, config: Any) -> NDArray[np.int64] | None:
    """Which row of transformers stands at each row of llama.cpp; None for the same order."""
    heads = heads_of_rows(name, model_type, config.num_attention_heads, config.num_key_value_heads)
    if heads is None:
        return None
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _blocks(
    matrix: Matrix, format: Format, checkpoint: Checkpoint
) -> tuple[Type, NDArray[np.uint8]]:
    """The ggml type, and (count, rows, bytes of a row)."""
    if format.exact:
        import torch

        dtype = torch.bfloat16 if format.kind == "bf16" else torch.float16
        value = checkpoint.weights.reference(matrix).to("cpu", dtype).contiguous()
        if not value.isfinite().all():
            raise BadInput(f"{matrix.name} holds weights beyond {format.name}")
        blocks = value.view(torch.uint8).numpy()
    else:
        encoded = checkpoint.weights.quantized(matrix, format)
        blocks = np.concatenate([blocks_of(part) for part in encoded])
    return ggml_type(format), blocks.reshape(matrix.count, matrix.out_features, -1)


def blocks_of(encoded: Encoded) -> NDArray[np.uint8]:
    """(out, bytes of a row) ggml blocks with the same values as an encoded matrix."""
    if isinstance(encoded, Blocks):
        return encoded.blocks.numpy()
    if isinstance(encoded, Levelled):
        return _mxfp4(encoded)
    if isinstance(encoded, Quantized | Affine):
        return _integers(encoded)
    raise ValueError(f"{encoded.format.name} is not stored in GGUF")


def _integers(encoded: Quantized | Affine) -> NDArray[np.uint8]:
    """A float16 scale, a float16 bias in q4_1 and q5_1, then the codes of 32 weights."""
    codes = _in_blocks(encoded.codes)
    constants = [encoded.scales] + ([encoded.biases] if isinstance(encoded, Affine) else [])
    fields = [value.cpu().numpy()[..., None].view(np.uint8) for value in constants]
    if encoded.format.bits == 8:
        return _rows(*fields, np.bitwise_xor(codes, np.uint8(128)))  # 128 is the code of zero
    if encoded.format.bits == 5:
        fields.append(np.packbits(codes >> 4, axis=2, bitorder="little"))
    return _rows(*fields, _nibbles(codes))


def _mxfp4(encoded: Levelled) -> NDArray[np.uint8]:
    """A power of two in 8 bits, then 32 E2M1 codes."""
    powers: NDArray[np.uint8] = encoded.pack()["scales"].numpy()
    return _rows(powers[..., None], _nibbles(_in_blocks(encoded.codes)))


def _in_blocks(codes: Tensor) -> NDArray[np.uint8]:
    """(rows, columns) -> (rows, blocks, 32)."""
    found: NDArray[np.uint8] = codes.cpu().numpy().reshape(len(codes), -1, 32)
    return found


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(…, 32) codes -> (…, 16): byte j holds the low bits of weights j and j + 16."""
    low = np.bitwise_and(codes, np.uint8(15))
    return np.bitwise_or(low[..., :16], np.left_shift(low[..., 16:], np.uint8(4)))


def _rows(*fields: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, blocks, n) fields of the blocks -> (rows, bytes)."""
    return np.concatenate(fields, axis=2).reshape(len(fields[0]), -1)
