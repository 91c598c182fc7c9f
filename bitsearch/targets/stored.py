"""Bytes that files store for a matrix, scales and all, by layout.

Tensors are counted, not the headers of files. The figures were read from files that the
tools wrote; the tests compare again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitsearch.formats import Format
from bitsearch.formats.integer import IntFormat

_SHAPE_BYTES = 16  # `weight_shape`, two int64


@dataclass(frozen=True, slots=True)
class Stored:
    """A layout of weight files.

    Attributes:
        matrix: (rows, columns, format) -> bytes of one matrix.
        kept: bytes of a parameter that gets no decision, such as a norm's.
    """

    matrix: Callable[[int, int, Format], int]
    kept: int = 2


def packed(rows: int, columns: int, format: Format) -> int:
    """bitsearch's own layout, the one that `Format.bytes` counts."""
    return format.bytes(rows, columns)


def compressed_tensors(rows: int, columns: int, format: Format) -> int:
    """The layouts of compressed-tensors 0.20.

    Integers (pack-quantized): codes fill 32-bit words along a row; a 16-bit scale a group;
    zero points, of asymmetric formats, fill 32-bit words down a column of groups; the shape.
    Floats: what the format counts.
    """
    if not isinstance(format, IntFormat):
        return format.bytes(rows, columns)
    groups = format.groups(columns)
    size = 4 * rows * _words(columns, format.bits) + 2 * rows * groups + _SHAPE_BYTES
    return size if format.symmetric else size + 4 * groups * _words(rows, format.bits)


def gptq(rows: int, columns: int, format: Format) -> int:
    """The GPTQ layout of GPTQModel 7.6.

    Codes fill 32-bit words down a column of the transposed matrix; a 16-bit scale and a
    zero point a group, symmetric formats too; a 32-bit group index a column.
    """
    if format.exact:
        return format.bytes(rows, columns)
    groups = format.groups(columns)
    codes, zeros = rows * _words(columns, format.bits), groups * _words(rows, format.bits)
    return 4 * (codes + zeros + columns) + 2 * rows * groups


def autoround(rows: int, columns: int, format: Format) -> int:
    """The layout of AutoRound 0.16: that of GPTQ, without group indices."""
    return gptq(rows, columns, format) - (0 if format.exact else 4 * columns)


def torchao(rows: int, columns: int, format: Format) -> int:
    """IntxWeightOnly of torchao 0.18: one byte a weight at every width, and a zero point."""
    if format.exact:
        return format.bytes(rows, columns)
    return rows * (columns + 3 * format.groups(columns))


def gguf(rows: int, columns: int, format: Format) -> int:
    """ggml's blocks, whose bytes the format itself counts; norms and biases are float32."""
    return format.bytes(rows, columns)


def mlx(rows: int, columns: int, format: Format) -> int:
    """MLX: codes in 32-bit words, which 32 weights fill; a 16-bit scale and bias a group."""
    if isinstance(format, IntFormat):
        return format.bytes(rows, columns) + 2 * rows * format.groups(columns)
    return format.bytes(rows, columns)


def modelopt(rows: int, columns: int, format: Format) -> int:
    """Exports of ModelOpt 0.47: as packed here, but with float32 scales of integers."""
    size = format.bytes(rows, columns)
    return size + 2 * rows * format.groups(columns) if format.kind == "int" else size


def _words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


STORED = {
    "packed": Stored(packed),
    "compressed-tensors": Stored(compressed_tensors),
    "gptq": Stored(gptq),
    "autoround": Stored(autoround),
    "torchao": Stored(torchao),
    "modelopt": Stored(modelopt),
    "gguf": Stored(gguf, kept=4),
    "mlx": Stored(mlx),
}
