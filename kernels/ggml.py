"""ggml's CPU backend through ctypes: tensors, graphs, threads. It knows no model.

The library is the one inside the `libggml-python` wheel. ggml aborts the process
where a shape is wrong, so that callers check shapes before they build an operation.
Handles are plain integers (addresses).
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import BadInput, BitsearchError, OutOfResources

DISTRIBUTION = "libggml-python"
# Values of `enum ggml_type`.
TYPES = {
    **{"f32": 0, "f16": 1, "bf16": 30, "i32": 26, "i64": 27},
    **{"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "mxfp4": 39},
    **{"iq4_nl": 20, "iq4_xs": 23},
    **{"q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14},
}
_FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vnni"),
    *("neon", "dotprod", "matmul_int8", "sve"),
)
_MAX_THREADS = 512
ALIGNMENT = 64


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * _MAX_THREADS),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


_P, _I64, _SIZE = c_void_p, c_int64, c_size_t
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_version": (c_char_p, ()),
    "ggml_nbytes": (_SIZE, (_P,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_graph_overhead_custom": (_SIZE, (_SIZE, c_bool)),
    "ggml_new_tensor_1d": (_P, (_P, c_int, _I64)),
    "ggml_new_tensor_2d": (_P, (_P, c_int, _I64, _I64)),
    "ggml_new_tensor_3d": (_P, (_P, c_int, _I64, _I64, _I64)),
    "ggml_new_tensor_4d": (_P, (_P, c_int, _I64, _I64, _I64, _I64)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_scale": (_P, (_P, _P, c_float)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_rms_norm": (_P, (_P, _P, c_float)),
    "ggml_reshape_2d": (_P, (_P, _P, _I64, _I64)),
    "ggml_reshape_3d": (_P, (_P, _P, _I64, _I64, _I64)),
    "ggml_reshape_4d": (_P, (_P, _P, _I64, _I64, _I64, _I64)),
    "ggml_view_2d": (_P, (_P, _P, _I64, _I64, _SIZE, _SIZE)),
    "ggml_view_3d": (_P, (_P, _P, _I64, _I64, _I64, _SIZE, _SIZE, _SIZE)),
    "ggml_view_4d": (_P, (_P, _P, _I64, _I64, _I64, _I64, _SIZE, _SIZE, _SIZE, _SIZE)),
    "ggml_permute": (_P, (_P, _P, c_int, c_int, c_int, c_int)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_geglu_split": (_P, (_P, _P, _P)),
    "ggml_rope_ext": (_P, (_P, _P, _P, _P, c_int, c_int, c_int, *(c_float,) * 6)),
    "ggml_cpy": (_P, (_P, _P, _P)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, c_float, c_float, c_float)),
    "ggml_new_graph_custom": (_P, (_P, _SIZE, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_backend_alloc_buffer": (_P, (_P, _SIZE)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_tensor_alloc": (c_int, (_P, _P, _P)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_get_default_buffer_type": (_P, (_P,)),
    "ggml_backend_tensor_set": (None, (_P, _P, _SIZE, _SIZE)),
    "ggml_backend_tensor_get": (None, (_P, _P, _SIZE, _SIZE)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_alloc_graph": (c_bool, (_P, _P)),
    "ggml_threadpool_params_init": (None, (ctypes.POINTER(_ThreadpoolParams), c_int)),
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (_P, _P)),
    "ggml_threadpool_new": (_P, (ctypes.POINTER(_ThreadpoolParams),)),
    "ggml_threadpool_free": (None, (_P,)),
    **{f"ggml_cpu_has_{name}": (c_int, ()) for name in _FEATURES},
    "ggml_backend_graph_compute": (c_int, (_P, _P)),
}


class Library:
    """The functions of ggml, under their own names without `ggml_`."""

    def __init__(self, folder: Path) -> None:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        base = ctypes.CDLL(str(folder / f"libggml-base.{suffix}"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / f"libggml-cpu.{suffix}"))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(base, name, None) or getattr(cpu, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml has no function {name}")


@cache
def library() -> Library:
    """The library of the installed wheel.

    Raises:
        BadInput: the wheel is missing, or its library cannot be loaded here.
    """
    found = find_spec("libggml")
    if found is None or found.origin is None:
        raise BadInput(
            "device 'ggml' needs the package libggml-python: pip install 'bitsearch[ggml]', "
            "or use --device torch-cpu, which needs nothing more"
        )
    try:
        package = Path(found.origin).parent
        folder = "lib64" if (package / "lib64").is_dir() else "lib"
        return Library(package / folder)
    except (OSError, AttributeError) as error:
        raise BadInput(
            f"the ggml library of libggml-python cannot be used here ({error}); "
            "reinstall it, or use --device torch-cpu"
        ) from error


def library_version() -> str:
    """Versions of the wheel and of the ggml inside."""
    try:
        wheel = version(DISTRIBUTION)
    except PackageNotFoundError:
        wheel = "unknown"
    return f"ggml {library().version().decode()} ({DISTRIBUTION} {wheel})"


def features() -> list[str]:
    """Instruction sets that the loaded build uses and this processor has."""
    return [name for name in _FEATURES if getattr(library(), f"cpu_has_{name}")()]


class Backend:
    """The CPU backend with its threads; close it, or leave it to the collector."""

    def __init__(self, threads: int) -> None:
        self.library = library()
        self.threads = threads
        self.handle: int = self.library.backend_cpu_init()
        self._pool: int | None = None
        self.library.backend_cpu_set_n_threads(self.handle, threads)
        if threads > 1:  # without a pool ggml makes and ends threads for every graph
            parameters = _ThreadpoolParams()
            self.library.threadpool_params_init(ctypes.byref(parameters), threads)
            self._pool = self.library.threadpool_new(ctypes.byref(parameters))
            self.library.backend_cpu_set_threadpool(self.handle, self._pool)
        self._end = weakref.finalize(self, _end_backend, self.library, self.handle, self._pool)

    def compute(self, graph: int) -> None:
        """Run a graph on all threads; returns when it is done."""
        if status := self.library.backend_graph_compute(self.handle, graph):
            raise BitsearchError(f"ggml could not compute a graph (status {status})")

    def close(self) -> None:
        """Free it, and end its threads."""
        self._end()


def _end_backend(library: Library, handle: int, pool: int | None) -> None:
    library.backend_free(handle)
    if pool is not None:
        library.threadpool_free(pool)


class Tensors:
    """Tensors of one context and the memory behind them.

    Args:
        backend: whose memory it is.
        count: most tensors and operations that will be made.
    """

    def __init__(self, backend: Backend, count: int) -> None:
        self.backend, self.library, self._count = backend, backend.library, count
        size = library().tensor_overhead() * count
        size += self.library.graph_overhead_custom(count, False) + 1024
        self.context: int = self.library.init(_InitParams(size, None, True))
        self._buffers: list[int] = []
        self._allocators: list[int] = []
        self._end = weakref.finalize(
            self, _end_tensors, self.library, self.context, self._buffers, self._allocators, backend
        )

    def new(self, type: str, *shape: int) -> int:
        """A tensor; the first extent is the one along which memory is contiguous."""
        make = getattr(self.library, f"new_tensor_{len(shape)}d")
        made: int = make(self.context, TYPES[type], *shape)
        return made

    def apply(self, operation: str, *arguments: Any) -> int:
        """The result of an operation, such as `mul_mat`, not computed yet."""
        made: int = getattr(self.library, operation)(self.context, *arguments)
        return made

    def place(self, tensors: Sequence[int], shared: Sequence[int] = ()) -> None:
        """Give tensors memory of their own, and all of `shared` one and the same.

        Raises:
            OutOfResources: there is not that much memory.
        """
        sizes = [-(-self.library.nbytes(tensor) // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        room = max((self.library.nbytes(tensor) for tensor in shared), default=0)
        total = sum(sizes) + room + ALIGNMENT
        buffer = self.library.backend_alloc_buffer(self.backend.handle, total)
        if not buffer:
            raise OutOfResources(f"ggml cannot have {total:,} bytes of memory")
        self._buffers.append(buffer)
        address = self.library.backend_buffer_get_base(buffer)
        for tensor, size in zip(tensors, sizes, strict=True):
            self.library.backend_tensor_alloc(buffer, tensor, address)
            address += size
        for tensor in shared:
            self.library.backend_tensor_alloc(buffer, tensor, address)

    def write(self, tensor: int, values: NDArray[Any], offset: int = 0) -> None:
        """Copy an array's bytes into a tensor, from a byte offset on."""
        values = np.ascontiguousarray(values)
        if offset + values.nbytes > self.library.nbytes(tensor):
            raise ValueError(f"{values.nbytes} bytes do not fit a tensor at {offset}")
        self.library.backend_tensor_set(tensor, values.ctypes.data, offset, values.nbytes)

    def read(self, tensor: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 tensor as an array of that shape."""
        values = np.empty(shape, np.float32)
        if values.nbytes != self.library.nbytes(tensor):
            raise ValueError(f"{shape} is not the shape of a tensor")
        self.library.backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return values

    def graph(self, results: Sequence[int]) -> int:
        """The graph that computes the results, in this order."""
        graph: int = self.library.new_graph_custom(self.context, self._count, False)
        for result in results:
            self.library.build_forward_expand(graph, result)
        return graph

    def schedule(self, graph: int) -> None:
        """Give memory to what a graph computes; it is used again once nobody reads it.

        Raises:
            OutOfResources: there is not that much memory.
        """
        kind = self.library.backend_get_default_buffer_type(self.backend.handle)
        allocator = self.library.gallocr_new(kind)
        self._allocators.append(allocator)
        if not self.library.gallocr_alloc_graph(allocator, graph):
            raise OutOfResources("ggml cannot have the memory for a step's activations")

    def close(self) -> None:
        """Free the memory."""
        self._end()


def _end_tensors(
    library: Library, context: int, buffers: list[int], allocators: list[int], _: Backend
) -> None:
    for allocator in allocators:
        library.gallocr_free(allocator)
    for buffer in buffers:
        library.backend_buffer_free(buffer)
    library.free(context)
