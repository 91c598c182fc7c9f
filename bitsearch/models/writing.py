"""Safetensors files written piece by piece, and always with the same bytes.

The safetensors library wants all tensors in memory at once, and writes the entries of
the metadata in any order. The layout is the one that it writes: a header of JSON, padded
with spaces to a multiple of 8; tensors by type, larger elements first, then by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# In the library's order: larger elements first, so that every tensor is aligned.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}
Entry = tuple[str, torch.dtype, Sequence[int]]


def header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors, which follow in the order of the entries."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in entries:
        end = start + dtype.itemsize * torch.Size(shape).numel()
        content[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def content(tensor: Tensor) -> bytes:
    """The bytes of a tensor in a file."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Entries in the order of the library: by type, then by name."""
    return sorted(entries, key=lambda entry: (_RANK[entry[1]], entry[0]))


def file_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a file, piece by piece."""
    entries = in_order((name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
    yield header(entries, metadata)
    for name, _, _ in entries:
        yield content(tensors[name])
