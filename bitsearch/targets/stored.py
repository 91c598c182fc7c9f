"""Bytes that other tools' files store for a matrix, scales and all.

Each function takes (rows, columns, format) of one matrix and counts tensors, not the
headers of files. Read from files that the tools wrote; the tests compare again.
"""

from __future__ import annotations

from bitsearch.formats import Format

_SHAPE_BYTES = 16  # `weight_shape`, two int64


def compressed_tensors(rows: int, columns: int, format: Format) -> int:
    """The pack-quantized layout of compressed-tensors 0.20.

    Codes fill 32-bit words along a row; a 16-bit scale a group; zero points, of asymmetric
    formats, fill 32-bit words down a column of groups; the shape.
    """
    if format.exact:
        return format.bytes(rows, columns)
    groups = format.groups(columns)
    size = 4 * rows * _words(columns, format.bits) + 2 * rows * groups + _SHAPE_BYTES
    return size if format.symmetric else size + 4 * groups * _words(rows, format.bits)


def _words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)
