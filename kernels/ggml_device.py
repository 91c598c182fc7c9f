"""The processor through ggml: kernels of 2 to 8 bits in blocks, and of 16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.formats import parse_format
from bitsearch.formats.gguf import BLOCKS
from bitsearch.kernels.devices import Launch, NoKernel
from bitsearch.kernels.ggml import Backend, Tensors, features, library_version
from bitsearch.kernels.ggml_decoder import GgmlModel
from bitsearch.kernels.ggml_formats import block_of, blocks, type_of
from bitsearch.kernels.on_processor import OnProcessor, copies_for
from bitsearch.kernels.random_weights import inputs, random_parts, relative_error
from bitsearch.kernels.regime import Regime, launch_of
from bitsearch.units import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.kernels.decoder_shape import DecoderShape
    from bitsearch.kernels.devices import Linear, Parts, UnitParts, Vectors

# What ggml rounds the activations of each type to before it multiplies.
_ACTIVATIONS = {"f16": "float16", "bf16": "bfloat16"}


class GgmlDevice(OnProcessor):
    """ggml's kernels on this processor, on a number of threads."""

    name = "ggml"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.backend = Backend(threads)

    def source(self) -> str:
        return library_version()

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"instructions": features()}

    def kernel(self, launch: Launch) -> str:
        return self._type(launch)

    def timed(self, launch: Launch, rotation: int, seed: int) -> GgmlTimed:
        return GgmlTimed(self, launch, self._type(launch), rotation, seed)

    def formats(self) -> tuple[str, ...]:
        known = (name for name in BLOCKS if type_of(parse_format(name)))
        return (*known, "bf16", "fp16")

    def linear(self, launch: Launch, parts: Parts | None) -> Linear:
        type = self._type(launch)
        return _Linear(self.backend, launch, stored(launch, parts, type), type)

    def decoder(
        self, shape: DecoderShape, units: UnitParts, vectors: Vectors, regime: Regime
    ) -> GgmlModel:
        def rows(unit: Unit) -> tuple[str, NDArray[np.uint8]]:
            name, parts = units(unit)
            launch = launch_of(unit, name, regime)
            type = self._type(launch)
            return type, stored(launch, parts, type)

        return GgmlModel(self.backend, shape, rows, vectors, regime)

    def _type(self, launch: Launch) -> str:
        """The ggml type that executes a launch."""
        if len(launch.segments) != 1:
            raise NoKernel("ggml runs one format a launch, not several")
        name = launch.segments[0][1]
        type = type_of(parse_format(name))
        if type is None:
            raise NoKernel(f"ggml has no kernel for {name}")
        if launch.k % block_of(type):
            raise NoKernel(f"ggml's {type} needs rows of whole blocks of {block_of(type)} weights, "
                           f"not {launch.k}")  # fmt: skip
        return type


class GgmlTimed:
    """One multiplication on many copies of random weights."""

    def __init__(
        self, device: GgmlDevice, launch: Launch, type: str, rotation: int, seed: int
    ) -> None:
        self.kernel = type
        self.activations = _ACTIVATIONS.get(type, "int8")
        self._device, self._backend = device, device.backend
        parts, values = random_parts(launch, seed)
        whole = stored(launch, parts, type)
        self._copies = copies_for(whole.nbytes, rotation)
        self.bytes = whole.nbytes + 4 * launch.m * (launch.n + launch.k)
        self._tensors = Tensors(self._backend, 2 * self._copies + 8)
        x = self._tensors.new("f32", launch.k, launch.m)
        weights = [self._tensors.new(type, launch.k, launch.n) for _ in range(self._copies)]
        results = [self._tensors.apply("mul_mat", weight, x) for weight in weights]
        # One place for all results: a model's activations stay in the cache too.
        self._tensors.place([x, *weights], shared=results)
        for weight in weights:
            self._tensors.write(weight, whole)
        given = inputs(launch.m, launch.k, seed)
        self._tensors.write(x, given)
        self._graph = self._tensors.graph(results)
        self._backend.compute(self._graph)
        found = self._tensors.read(results[-1], (launch.m, launch.n))
        self.error = relative_error(found, given, values)

    def sample(self) -> float:
        start = self._device.now()
        self._backend.compute(self._graph)
        return (self._device.now() - start) / self._copies

    def close(self) -> None:
        self._tensors.close()


class _Linear:
    """A fused set on weights of ours."""

    def __init__(
        self, backend: Backend, launch: Launch, weights: NDArray[np.uint8], type: str
    ) -> None:
        self._shape = (launch.m, launch.n)
        self._backend, self._tensors = backend, Tensors(backend, 8)
        self._x = self._tensors.new("f32", launch.k, launch.m)
        weight = self._tensors.new(type, launch.k, launch.n)
        self._y = self._tensors.apply("mul_mat", weight, self._x)
        self._tensors.place([self._x, weight, self._y])
        self._tensors.write(weight, weights)
        self._graph = self._tensors.graph([self._y])

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        self._tensors.write(self._x, x.numpy())
        self._backend.compute(self._graph)
        return torch.from_numpy(self._tensors.read(self._y, self._shape))


def stored(launch: Launch, parts: Parts | None, type: str) -> NDArray[np.uint8]:
    """The (n, bytes of a row) weights of a launch; random ones if there are none."""
    parts = parts or random_parts(launch, 0)[0]
    encoded = {id(part): blocks(part, type) for part in parts}  # random parts repeat one
    return np.concatenate([encoded[id(part)] for part in parts])[: launch.n]


def open_device(threads: int) -> GgmlDevice:
    """ggml's CPU kernels, by libggml-python: 2 to 8 bits in blocks, and 16."""
    return GgmlDevice(threads)
