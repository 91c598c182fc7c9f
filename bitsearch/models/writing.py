"""Safetensors files written piece by piece, and always with the same bytes.

The safetensors library wants all tensors in memory at once, and writes the entries of
the metadata in any order. The layout is the one that it writes: a header of JSON, padded
with spaces to a multiple of 8; tensors by type, larger elements first, then by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

# In the library's order: larger elements first, so that every tensor is aligned.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
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


class DeclaredFile:
    """A file of tensors that come one by one, in any order, and whose shapes are known.

    Args:
        path: of the file.
        entries: every tensor.
        metadata: of the header.
    """

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
        ordered = in_order(entries)
        start = header(ordered, metadata)
        self._places: dict[str, int] = {}
        end = len(start)
        for name, dtype, shape in ordered:
            self._places[name] = end
            end += dtype.itemsize * torch.Size(shape).numel()
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(start)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the declared type and shape."""
        self._file.seek(self._places.pop(name))
        self._file.write(content(tensor))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._places:
            raise ValueError(f"{min(self._places)} was not written")


class GatheredFile:
    """A file of tensors that come one by one, in any order, and are not known before.

    They gather in a second file beside it, which is as large and goes in the end.

    Args:
        path: of the file.
        metadata: of the header.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path, self._metadata = path, metadata
        self._beside = path.with_name(f".{path.name}.gathered")
        self._entries: list[Entry] = []
        self._places: dict[str, int] = {}
        self._file: BinaryIO = open(self._beside, "w+b")  # noqa: SIM115 - closed by __exit__

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor."""
        self._entries.append((name, tensor.dtype, tuple(tensor.shape)))
        self._places[name] = self._file.tell()
        self._file.write(content(tensor))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            self._file.close()
            self._beside.unlink()

    def _write(self) -> None:
        ordered = in_order(self._entries)
        with open(self._path, "wb") as file:
            file.write(header(ordered, self._metadata))
            for name, dtype, shape in ordered:
                self._file.seek(self._places[name])
                _copy(self._file, file, dtype.itemsize * torch.Size(shape).numel())


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, 1 << 24))
        target.write(piece)
        size -= len(piece)
