"""A decoder of the Llama kind as one ggml graph: a whole step with every kernel ggml's.

This is what an engine on ggml runs: the embedding's lookup, norms, rotary embedding,
attention over a float16 KV cache, and one multiplication a unit, in the unit's format.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.kernels import processor
from bitsearch.kernels.decoder_shape import Block, DecoderShape
from bitsearch.kernels.ggml import Backend, Tensors
from bitsearch.kernels.random_weights import inputs as given
from bitsearch.kernels.regime import Regime
from bitsearch.units import Unit

# A unit's rows as ggml stores them, with the type; parameters as float32.
Weights = Callable[[Unit], tuple[str, NDArray[np.uint8]]]
Vectors = Callable[[str], NDArray[np.float32]]

_NEOX = 2  # rotary pairs are halves of a head, as in transformers
_BASE = 10000.0
_NODES = 48  # of a block, with room


class GgmlDecoder:
    """A model's weights in ggml, with a KV cache; steps are made from it.

    Args:
        backend: what computes.
        shape: of the model.
        weights: each unit's rows and their ggml type.
        vectors: norms and biases by parameter name.
        batch: sequences that run together.
        context: tokens that the cache holds of each.
    """

    def __init__(
        self,
        backend: Backend,
        shape: DecoderShape,
        weights: Weights,
        vectors: Vectors,
        batch: int,
        context: int,
    ) -> None:
        self.backend, self.shape, self.batch, self.context = backend, shape, batch, context
        units = {unit.name: unit for unit in _units(shape)}
        self.store = Tensors(backend, 8 * len(units) + 16 * len(shape.blocks) + 16)
        filled: list[tuple[int, NDArray[Any]]] = []

        def hold(values: NDArray[Any], type: str, *extents: int) -> int:
            tensor = self.store.new(type, *extents)
            filled.append((tensor, values))
            return tensor

        self.weights: dict[str, int] = {}
        self.biases: dict[str, int] = {}
        for name, unit in units.items():
            type, rows = weights(unit)
            k, n = unit.matrices[0].in_features, sum(m.out_features for m in unit.matrices)
            self.weights[name] = hold(rows, type, k, n)
            added = [shape.biases[m.name] for m in unit.matrices if m.name in shape.biases]
            if added:
                self.biases[name] = hold(np.concatenate([vectors(b) for b in added]), "f32", n)
        names = [*(norm for block in shape.blocks for norm in block.norms.values()), shape.norm]
        self.norms = {
            name: hold(values, "f32", len(values))
            for name in names
            for values in [vectors(name) + np.float32(shape.norm_offset)]
        }
        index = np.arange(shape.head_dim // 2, dtype=np.float64)
        plain = _BASE ** (-2 * index / shape.head_dim)
        self.factors = [
            hold((plain / block.frequencies).astype(np.float32), "f32", shape.head_dim // 2)
            for block in shape.blocks
        ]
        row = shape.kv_heads * shape.head_dim
        empty = np.zeros((batch, context, row), np.float16)
        self.cache = [
            tuple(hold(empty, "f16", row, context, batch) for _ in "kv") for _ in shape.blocks
        ]
        self.store.place([tensor for tensor, _ in filled])
        for tensor, values in filled:
            self.store.write(tensor, values)

    def step(self, tokens: int, past: int) -> GgmlStep:
        """The step that runs so many tokens of each sequence after `past` ones.

        Args:
            tokens: new ones of each sequence.
            past: how many are in the cache; those and the new ones must fit.
        """
        if past + tokens > self.context:
            raise ValueError(f"{past} + {tokens} tokens in a cache of {self.context}")
        return GgmlStep(self, tokens, past)

    def close(self) -> None:
        """Free the memory."""
        self.store.close()


class GgmlStep:
    """One step's graph, ready to run again and again."""

    def __init__(self, decoder: GgmlDecoder, tokens: int, past: int) -> None:
        self._decoder = decoder
        self._tokens, self._past, self._end = tokens, past, past + tokens
        shape, batch = decoder.shape, decoder.batch
        self._rows = tokens * batch
        self._t = Tensors(decoder.backend, _NODES * (len(shape.blocks) + 2))
        self._ids = self._t.new("i32", self._rows)
        self._positions = self._t.new("i32", self._rows)
        self._masks: dict[int | None, int] = {}
        if tokens > 1:
            for window in {block.window for block in shape.blocks}:
                self._masks[window] = self._t.new("f16", self._end, tokens)
        self._t.place([self._ids, self._positions, *self._masks.values()])
        self._results: list[int] = []
        self._logits = self._forward()
        self._graph = self._t.graph([*self._results, self._logits])
        self._t.schedule(self._graph)
        positions = np.tile(np.arange(past, self._end, dtype=np.int32), batch)
        self._t.write(self._positions, positions)
        self._t.write(self._ids, np.zeros(self._rows, np.int32))
        for window, mask in self._masks.items():
            self._t.write(mask, _mask(tokens, past, window))

    def run(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """(batch, tokens) ids to the (batch, vocabulary) logits of each last token."""
        self._t.write(self._ids, ids.astype(np.int32))
        self._decoder.backend.compute(self._graph)
        rows = self._decoder.shape.head.matrices[0].out_features
        return self._t.read(self._logits, (self._decoder.batch, rows))

    def sample(self) -> tuple[float, float]:
        """Nanoseconds of one step, on the device's clock and on the wall's."""
        return _timed(self._decoder.backend, self._graph)

    def close(self) -> None:
        """Free the graph's memory; the decoder's stays."""
        self._t.close()

    def _forward(self) -> int:
        t, shape, decoder = self._t, self._decoder.shape, self._decoder
        x = t.apply("get_rows", decoder.weights[shape.embedding.name], self._ids)
        if shape.embedding_scale != 1.0:
            x = t.apply("scale", x, shape.embedding_scale)
        for index, block in enumerate(shape.blocks):
            x = t.apply("add", x, self._attention(block, index, x))
            x = t.apply("add", x, self._mlp(block, x))
        stride = 4 * shape.width
        last = t.apply("view_2d", x, shape.width, decoder.batch, stride * self._tokens,
                       stride * (self._tokens - 1))  # fmt: skip
        return self._product(shape.head, self._norm(last, shape.norm))

    def _norm(self, x: int, name: str) -> int:
        scaled = self._t.apply("rms_norm", x, self._decoder.shape.epsilon)
        return self._t.apply("mul", scaled, self._decoder.norms[name])

    def _after(self, block: Block, norm: str, x: int) -> int:
        return self._norm(x, block.norms[norm]) if norm in block.norms else x

    def _product(self, unit: Unit, x: int) -> int:
        """A unit's result, (Σ out, rows)."""
        y = self._t.apply("mul_mat", self._decoder.weights[unit.name], x)
        bias = self._decoder.biases.get(unit.name)
        return y if bias is None else self._t.apply("add", y, bias)

    def _parts(
        self, block: Block, roles: tuple[str, ...], x: int
    ) -> dict[str, tuple[int, int, int]]:
        """For each role the tensor that holds it, its byte offset in a row, a row's bytes."""
        found: dict[str, tuple[int, int, int]] = {}
        for unit in {block.units[role].name: block.units[role] for role in roles}.values():
            y, offset = self._product(unit, x), 0
            row = 4 * sum(matrix.out_features for matrix in unit.matrices)
            for matrix in unit.matrices:
                found[matrix.role.rpartition(".")[2]] = (y, offset, row)
                offset += 4 * matrix.out_features
        return found

    def _attention(self, block: Block, index: int, x: int) -> int:
        t, shape, batch, tokens = self._t, self._decoder.shape, self._decoder.batch, self._tokens
        parts = self._parts(block, ("q", "k", "v"), self._norm(x, block.norms["attention"]))
        q = self._rotated(block, index, *parts["q"], shape.heads, "q")
        k = self._rotated(block, index, *parts["k"], shape.kv_heads, "k")
        v, offset, row = parts["v"]
        width = shape.kv_heads * shape.head_dim
        k = t.apply("reshape_3d", k, width, tokens, batch)
        v = t.apply("view_3d", v, width, tokens, batch, row, row * tokens, offset)
        keys, values = (
            self._cached(cache, new)
            for cache, new in zip(self._decoder.cache[index], (k, v), strict=True)
        )
        # One token sees a window as a shorter cache, several through a mask.
        first = max(0, self._end - block.window) if block.window and tokens == 1 else 0
        seen = [
            t.apply("view_4d", cache, shape.head_dim, self._end - first, shape.kv_heads, batch,
                    2 * width, 2 * shape.head_dim, 2 * width * self._decoder.context,
                    2 * width * first)
            for cache in (keys, values)
        ]  # fmt: skip
        q = t.apply("reshape_4d", q, shape.head_dim, shape.heads, tokens, batch)
        q = t.apply("permute", q, 0, 2, 1, 3)
        mask = self._masks.get(block.window)
        found = t.apply("flash_attn_ext", q, *seen, mask, shape.attention_scale, 0.0, 0.0)
        found = t.apply("reshape_2d", found, shape.heads * shape.head_dim, self._rows)
        found = self._product(block.units["o"], found)
        return self._after(block, "after_attention", found)

    def _rotated(
        self, block: Block, index: int, y: int, offset: int, row: int, heads: int, norm: str
    ) -> int:
        """(head_dim, heads, rows) queries or keys, turned by their positions."""
        shape = self._decoder.shape
        x = self._t.apply("view_3d", y, shape.head_dim, heads, self._rows, 4 * shape.head_dim,
                          row, offset)  # fmt: skip
        x = self._after(block, norm, x)
        return self._t.apply(
            "rope_ext", x, self._positions, self._decoder.factors[index], shape.head_dim, _NEOX, 0,
            _BASE, 1.0, 0.0, block.rotary_scale, 32.0, 1.0,
        )  # fmt: skip

    def _cached(self, cache: int, new: int) -> int:
        """The cache, once the new keys or values lie in it."""
        shape, context = self._decoder.shape, self._decoder.context
        width = shape.kv_heads * shape.head_dim
        place = self._t.apply("view_3d", cache, width, self._tokens, self._decoder.batch,
                              2 * width, 2 * width * context, 2 * width * self._past)  # fmt: skip
        # Computed before all that comes after it: results run in order.
        self._results.append(self._t.apply("cpy", new, place))
        return cache

    def _mlp(self, block: Block, x: int) -> int:
        t, shape = self._t, self._decoder.shape
        parts = self._parts(block, ("gate", "up"), self._norm(x, block.norms["mlp"]))
        width = block.units["down"].matrices[0].in_features
        gate, up = (
            t.apply("view_2d", y, width, self._rows, row, offset)
            for y, offset, row in (parts["gate"], parts["up"])
        )
        gated = t.apply("swiglu_split" if shape.activation == "silu" else "geglu_split", gate, up)
        found = self._product(block.units["down"], gated)
        return self._after(block, "after_mlp", found)


class GgmlStack:
    """A step's multiplications alone, in its order, on inputs that stay in the cache."""

    def __init__(self, decoder: GgmlDecoder, tokens: int) -> None:
        shape, self._backend = decoder.shape, decoder.backend
        units = _units(shape)[1:]
        self._t = Tensors(self._backend, 4 * len(units) + 16)
        inputs: dict[tuple[int, int], int] = {}
        results = []
        for index, unit in enumerate(units):
            rows = decoder.batch * (1 if index == len(units) - 1 else tokens)
            key = (unit.matrices[0].in_features, rows)
            if key not in inputs:
                inputs[key] = self._t.new("f32", *key)
            results.append(self._t.apply("mul_mat", decoder.weights[unit.name], inputs[key]))
        self._t.place(list(inputs.values()), shared=results)
        for (columns, rows), tensor in inputs.items():
            self._t.write(tensor, given(rows, columns, 0))
        self._graph = self._t.graph(results)

    def sample(self) -> tuple[float, float]:
        """Nanoseconds of one run, on the device's clock and on the wall's."""
        return _timed(self._backend, self._graph)

    def close(self) -> None:
        """Free the graph's memory; the decoder's stays."""
        self._t.close()


class GgmlModel:
    """A decoder with the step of a regime and the stack of its launches."""

    def __init__(
        self,
        backend: Backend,
        shape: DecoderShape,
        weights: Weights,
        vectors: Vectors,
        regime: Regime,
    ) -> None:
        self.decoder = GgmlDecoder(backend, shape, weights, vectors, regime.batch, regime.context)
        self.step = self.decoder.step(regime.tokens, regime.context - regime.tokens)
        self.stack = GgmlStack(self.decoder, regime.tokens)

    def close(self) -> None:
        """Free the memory."""
        for part in (self.step, self.stack, self.decoder):
            part.close()


def _timed(backend: Backend, graph: int) -> tuple[float, float]:
    clock = processor.clock(backend.threads)
    wall, start = time.perf_counter_ns(), processor.now(clock)
    backend.compute(graph)
    return processor.now(clock) - start, time.perf_counter_ns() - wall


def _units(shape: DecoderShape) -> list[Unit]:
    """The units in forward order; the last is the head."""
    inside = [
        unit
        for block in shape.blocks
        for unit in {unit.name: unit for unit in block.units.values()}.values()
    ]
    return [shape.embedding, *inside, shape.head]


def _mask(tokens: int, past: int, window: int | None) -> NDArray[np.float16]:
    """(tokens, past + tokens): 0 where a query sees a key, −inf elsewhere."""
    query = np.arange(past, past + tokens)[:, None]
    key = np.arange(past + tokens)[None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return np.where(seen, 0.0, -np.inf).astype(np.float16)
