"""Load machine code into the CUDA context of torch, and launch it on torch's stream."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from bitsearch.errors import BadInput
from bitsearch.kernels.nvrtc import compile_kernel

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded entry point."""

    function: ctypes.c_void_p

    def allow_shared(self, size: int) -> None:
        """Let a launch take so many bytes of dynamic shared memory."""
        _check(
            _cuda().cuFuncSetAttribute(self.function, _MAX_DYNAMIC_SHARED, size), "shared memory"
        )

    def attribute(self, number: int) -> int:
        """A CUfunction_attribute, such as 4, registers of a thread."""
        value = ctypes.c_int()
        _check(_cuda().cuFuncGetAttribute(ctypes.byref(value), number, self.function), "attribute")
        return value.value

    def launch(
        self, grid: int, block: int, shared: int, *args: object, overlap: bool = False
    ) -> None:
        """Launch on torch's current stream.

        Args:
            grid: blocks.
            block: threads of a block.
            shared: bytes of dynamic shared memory of a block.
            args: ctypes values, in the order of the kernel's parameters.
            overlap: let it start before the kernel before it has ended; it must itself
                wait before it reads what that one writes.
        """
        stream = torch.cuda.current_stream().cuda_stream
        attribute = _Attribute(_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
        config = _Config(
            grid, 1, 1, block, 1, 1, shared, stream, ctypes.pointer(attribute), int(overlap)
        )
        pointers = (ctypes.c_void_p * len(args))(
            *(ctypes.cast(ctypes.pointer(arg), ctypes.c_void_p) for arg in args)  # type: ignore[type-var]
        )
        _check(
            _cuda().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None), "launch"
        )


@cache
def load(entry: str, device: int, name: str = "entry") -> Kernel:
    """Compile an entry point for a device and load it there; see `compile_kernel`."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the context exists and is current from here
        major, minor = torch.cuda.get_device_capability(device)
        suffix = "a" if major >= 9 else ""
        code = compile_kernel(entry, f"sm_{major}{minor}{suffix}")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_cuda().cuModuleLoadData(ctypes.byref(module), code), "load machine code")
        _check(
            _cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
            "find the entry point",
        )
    return Kernel(function)


@cache
def _cuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BadInput("no CUDA driver here; kernels for NVIDIA devices cannot run") from error


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        message = (text.value or b"unknown").decode()
        raise RuntimeError(f"CUDA, {what}: {message} (error {status})")
