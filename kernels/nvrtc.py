"""Compile the CUDA sources at run time, with the compiler that a CUDA build of torch brings.

NVRTC alone is needed: the sources include no CUDA header. Machine code is kept in
`~/.cache/bitsearch/kernels`, by a hash of the sources, the entry point, the target and the
compiler's version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bitsearch.errors import BadInput

SOURCES = Path(__file__).parent / "cuda"
CACHE = Path.home() / ".cache" / "bitsearch" / "kernels"


def sources() -> dict[str, str]:
    """The text of every CUDA header, by file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh"))}


def source_hash() -> str:
    """SHA-256 of every CUDA header with its name: what a record of a device is of."""
    joined = "".join(f"{name}\0{text}\0" for name, text in sources().items())
    return hashlib.sha256(joined.encode()).hexdigest()


def compile_kernel(entry: str, target: str) -> bytes:
    """Machine code of an entry point.

    Args:
        entry: C++ text of one `extern "C" __global__` function, with its includes.
        target: architecture, such as `sm_90a`.

    Raises:
        BadInput: there is no NVRTC here.
        RuntimeError: the source does not compile; the message is the compiler's log.
    """
    compiler = _compiler()
    version = _version(compiler)
    key = hashlib.sha256(f"{source_hash()}\0{entry}\0{target}\0{version}".encode()).hexdigest()
    cached = CACHE / f"{key}.cubin"
    try:
        return cached.read_bytes()
    except OSError:
        code = _compile(compiler, entry, target)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}")
    partial.write_bytes(code)
    partial.replace(cached)
    return code


def _compile(compiler: ctypes.CDLL, entry: str, target: str) -> bytes:
    program = ctypes.c_void_p()
    headers = sources()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    _check(
        compiler.nvrtcCreateProgram(
            ctypes.byref(program), entry.encode(), b"entry.cu", len(headers), texts, names
        ),
        "create a program",
    )
    try:
        options = [f"--gpu-architecture={target}", "--std=c++17", "--restrict"]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if compiler.nvrtcCompileProgram(program, len(options), given):
            raise RuntimeError(
                f"a kernel does not compile for {target}:\n{_log(compiler, program)}"
            )
        size = ctypes.c_size_t()
        _check(compiler.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size machine code")
        code = ctypes.create_string_buffer(size.value)
        _check(compiler.nvrtcGetCUBIN(program, code), "fetch machine code")
        return code.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _log(compiler: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def _version(compiler: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def _compiler() -> ctypes.CDLL:
    found = find_spec("nvidia")
    roots = [] if found is None else [Path(root) for root in found.submodule_search_locations or ()]
    for root in roots:
        for library in sorted(root.glob("*/lib/libnvrtc.so.*")):
            # The compiler loads this one by name, from wherever it is already loaded.
            for builtins in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BadInput("no NVRTC here: install a CUDA build of torch, or nvidia-cuda-nvrtc")


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"NVRTC could not {what}: error {status}")
