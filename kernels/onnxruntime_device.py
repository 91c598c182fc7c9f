"""The processor through ONNX Runtime: `MatMulNBits` of 2, 4 and 8 bits, and float32.

    int{2,4,8}-gG (-sym)   `com.microsoft.MatMulNBits`, G of 16 to 256, a power of two
    bf16                   `MatMul` on the same values in float32

Accuracy level 4: activations are rounded to int8 in blocks. At level 0, with float32
activations, 2 and 8 bits run a scalar path that is some hundred times slower.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format, parse_format
from bitsearch.kernels.devices import Launch, NoKernel
from bitsearch.kernels.on_processor import OnProcessor, copies_for
from bitsearch.kernels.random_weights import inputs, random_parts, relative_error
from bitsearch.quantizers.quantized import pack_rows

if TYPE_CHECKING:
    from bitsearch.kernels.devices import Linear, Parts

log = logging.getLogger(__name__)

_BITS, _GROUPS = (2, 4, 8), (16, 32, 64, 128, 256)
_ACCURACY_LEVEL = 4
_OPSET, _IR = 21, 10

# Threads of the pool that all sessions of this process share, once it is made.
_POOL: list[int] = []

Initializers = dict[str, NDArray[Any]]


class OnnxRuntime(OnProcessor):
    """ONNX Runtime's kernels on this processor, on a number of threads."""

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise BadInput(
                "device 'onnxruntime' needs onnxruntime and onnx: pip install "
                "'bitsearch[onnxruntime]', or use --device torch-cpu, which needs nothing more"
            ) from error
        self._onnx, self._runtime = onnx, onnxruntime
        self._shares = _shares_pool(onnxruntime, threads)
        if not self._shares:
            log.warning(
                "onnxruntime %s has no pool of %d threads that its sessions can share here: "
                "each has its own, and whole steps take far longer than in a process of its own",
                onnxruntime.__version__,
                threads,
            )

    def source(self) -> str:
        return f"onnxruntime {self._runtime.__version__}, accuracy level {_ACCURACY_LEVEL}"

    def formats(self) -> tuple[str, ...]:
        integers = (f"int{bits}-g{size}" for bits in _BITS for size in (32, 64, 128))
        return (*integers, "bf16")

    def kernel(self, launch: Launch) -> str:
        if len(launch.segments) != 1:
            raise NoKernel("onnxruntime runs one format a launch, not several")
        format = parse_format(launch.segments[0][1])
        if format.kind == "bf16":
            return "MatMul"
        if format.kind != "int" or format.bits not in _BITS or format.group_size not in _GROUPS:
            raise NoKernel(
                f"onnxruntime has no kernel for {format.name}; it has int2, int4 and int8 in "
                "groups of 16 to 256, and bf16"
            )
        if launch.k % format.group_size:
            raise NoKernel(f"onnxruntime's {format.name} needs columns in whole groups, not "
                           f"{launch.k}")  # fmt: skip
        return f"MatMulNBits-{format.bits}"

    def timed(self, launch: Launch, rotation: int, seed: int) -> OnnxTimed:
        return OnnxTimed(self, launch, rotation, seed)

    def linear(self, launch: Launch, parts: Parts | None) -> Linear:
        self.kernel(launch)
        format = parse_format(launch.segments[0][1])
        stored = stored_as(format, parts or random_parts(launch, 0)[0], launch.n)
        session = self.session(launch, format, stored, 1)

        def run(x: Tensor) -> Tensor:
            (found,) = session.run(None, {"x": x.numpy()})
            return torch.from_numpy(found)

        return run

    def session(self, launch: Launch, format: Format, stored: Initializers, copies: int) -> Any:
        """A session of so many multiplications of one input, each on weights of its own.

        The first has the weights given, the others random ones: equal ones would be one
        in memory.
        """
        helper, numpy_helper = self._onnx.helper, self._onnx.numpy_helper
        kind = self._onnx.TensorProto.FLOAT
        nodes, initializers, outputs = [], [], []
        for copy in range(copies):
            names = [f"{name}{copy}" for name in stored]
            held = stored if copy == 0 else _others(stored, copy)
            initializers += [
                numpy_helper.from_array(values, name)
                for values, name in zip(held.values(), names, strict=True)
            ]
            nodes.append(self._node(helper, launch, format, ["x", *names], f"y{copy}"))
            outputs.append(helper.make_tensor_value_info(f"y{copy}", kind, [launch.m, launch.n]))
        x = helper.make_tensor_value_info("x", kind, [launch.m, launch.k])
        graph = helper.make_graph(nodes, "launches", [x], outputs, initializers)
        domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=_IR)
        options = self._runtime.SessionOptions()
        if self._shares:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        return self._runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _node(self, helper: Any, launch: Launch, format: Format, given: list[str], y: str) -> Any:
        if format.kind == "bf16":
            return helper.make_node("MatMul", given, [y])
        return helper.make_node(
            "MatMulNBits",
            given,
            [y],
            domain="com.microsoft",
            K=launch.k,
            N=launch.n,
            bits=format.bits,
            block_size=format.group_size,
            accuracy_level=_ACCURACY_LEVEL,
        )


def _shares_pool(runtime: Any, threads: int) -> bool:
    """Whether sessions compute in one pool of that many threads.

    A model has a session for every launch. Each with threads of its own, which spin for a
    while after their work, a step of 120 launches took 1.7 s on two cores instead of 19 ms.
    """
    if not _POOL:
        try:
            runtime.set_global_thread_pool_sizes(threads, 1)
        except (AttributeError, runtime.capi.onnxruntime_pybind11_state.Fail):
            return False  # an old version, or somebody made a pool before
        _POOL.append(threads)
    return _POOL[0] == threads


class OnnxTimed:
    """One multiplication on many copies of random weights, all in one session."""

    def __init__(self, device: OnnxRuntime, launch: Launch, rotation: int, seed: int) -> None:
        self.kernel = device.kernel(launch)
        self._device = device
        format = parse_format(launch.segments[0][1])
        self.activations = "float32" if format.exact else "int8"
        parts, values = random_parts(launch, seed)
        stored = stored_as(format, parts, launch.n)
        size = sum(array.nbytes for array in stored.values())
        self.bytes = size + 4 * launch.m * (launch.n + launch.k)
        self._copies = copies_for(size, rotation)
        self._session: Any = device.session(launch, format, stored, self._copies)
        self._x = inputs(launch.m, launch.k, seed)
        self.error = relative_error(self._session.run(None, {"x": self._x})[0], self._x, values)

    def sample(self) -> float:
        start = self._device.now()
        self._session.run(None, {"x": self._x})
        return (self._device.now() - start) / self._copies

    def close(self) -> None:
        self._session = None


def stored_as(format: Format, parts: Parts, rows: int) -> Initializers:
    """The first `rows` of stacked matrices as the operator takes them, in its inputs' order."""
    if format.exact:
        tensors = [part for part in parts if isinstance(part, Tensor)]
        weights = torch.cat(tensors)[:rows].bfloat16().float()
        return {"weights": weights.T.contiguous().numpy()}
    integers: list[Any] = list(parts)
    codes, scales, zeros = (
        torch.cat([getattr(part, name) for part in integers])[:rows].numpy()
        for name in ("codes", "scales", "zeros")
    )
    groups = scales.shape[1]
    return {
        "codes": pack_rows(codes, format.bits).reshape(rows, groups, -1),
        "scales": scales.astype(np.float32),
        "zeros": pack_rows(zeros, format.bits),
    }


def _others(stored: Initializers, seed: int) -> Initializers:
    """Other weights of the same types and shapes."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.integers(0, 256, values.shape, dtype=np.uint8)
        if values.dtype == np.uint8
        else generator.random(values.shape, dtype=np.float32)
        for name, values in stored.items()
    }


def open_device(threads: int) -> OnnxRuntime:
    """ONNX Runtime's MatMulNBits: 2, 4 and 8 bits, activations in 8."""
    return OnnxRuntime(threads)
