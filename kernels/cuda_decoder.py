"""A decoder of the Llama kind as CUDA graphs: a whole step without Python in between.

Norms, rotary embedding and attention are torch's; each unit is one launch of a device.
The embedding is looked up in a 16-bit table of its own, also where the head is quantized.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from bitsearch.kernels.decoder_shape import Block, DecoderShape
from bitsearch.kernels.random_planes import random_input
from bitsearch.kernels.regime import Regime, launch_of
from bitsearch.kernels.replay import Replay
from bitsearch.units import Unit

if TYPE_CHECKING:
    from bitsearch.kernels.devices import Device, Linear, UnitParts, Vectors

_WARM_SECONDS = 0.05  # under load, until clocks have risen


class TorchDecoder:
    """Computes a step on tensors that stay where they are, so that a graph can hold it.

    Args:
        device: what runs the units.
        shape: of the model.
        units: each unit's format name and matrices.
        vectors: norms and biases by parameter name.
        regime: of the steps.
    """

    def __init__(
        self,
        device: Device,
        shape: DecoderShape,
        units: UnitParts,
        vectors: Vectors,
        regime: Regime,
    ) -> None:
        self.shape, self.regime = shape, regime
        self._like = {"device": device.place, "dtype": getattr(torch, device.dtype)}
        self.linears: dict[str, Linear] = {}
        self.biases: dict[str, Tensor] = {}
        for unit in forward_units(shape):
            name, parts = units(unit)
            self.linears[unit.name] = device.linear(launch_of(unit, name, regime), parts)
            added = [shape.biases[m.name] for m in unit.matrices if m.name in shape.biases]
            if added:
                self.biases[unit.name] = torch.cat([self._tensor(vectors(b)) for b in added])
        names = [*(norm for block in shape.blocks for norm in block.norms.values()), shape.norm]
        self.norms = {name: self._tensor(vectors(name) + shape.norm_offset) for name in names}
        self.table = self._embedding(units)
        cached = (regime.batch, shape.kv_heads, regime.context, shape.head_dim)
        self.cache = [
            (torch.randn(cached, **self._like), torch.randn(cached, **self._like))
            for _ in shape.blocks
        ]
        self.past = regime.context - regime.tokens
        self.ids = torch.zeros(regime.batch, regime.tokens, dtype=torch.long, device=device.place)
        positions = torch.arange(self.past, regime.context, dtype=torch.float64)
        self._rotary = [self._turns(block, positions) for block in shape.blocks]
        self._masks = {
            block.window: self._mask(block.window) for block in shape.blocks if regime.tokens > 1
        }

    @torch.no_grad()
    def step(self) -> Tensor:
        """(batch, vocabulary) logits of each last token of `ids`."""
        x = functional.embedding(self.ids, self.table) * self.shape.embedding_scale
        for block, cache, rotary in zip(self.shape.blocks, self.cache, self._rotary, strict=True):
            x = x + self._attention(block, cache, rotary, x)
            x = x + self._mlp(block, x)
        return self._unit(self.shape.head, self._norm(x[:, -1], self.shape.norm))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.norms[name]
        return functional.rms_norm(x, weight.shape, weight, self.shape.epsilon)

    def _after(self, block: Block, norm: str, x: Tensor) -> Tensor:
        return self._norm(x, block.norms[norm]) if norm in block.norms else x

    def _unit(self, unit: Unit, x: Tensor) -> Tensor:
        y = self.linears[unit.name](x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        bias = self.biases.get(unit.name)
        return y if bias is None else y + bias

    def _parts(self, block: Block, roles: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for unit in {block.units[role].name: block.units[role] for role in roles}.values():
            split = self._unit(unit, x).split([m.out_features for m in unit.matrices], dim=-1)
            found |= {
                m.role.rpartition(".")[2]: y for m, y in zip(unit.matrices, split, strict=True)
            }
        return found

    def _attention(
        self, block: Block, cache: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor], x: Tensor
    ) -> Tensor:
        shape, end = self.shape, self.regime.context
        parts = self._parts(block, ("q", "k", "v"), self._norm(x, block.norms["attention"]))
        heads = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        q, k, v = (
            parts[role].unflatten(-1, (count, shape.head_dim)) for role, count in heads.items()
        )
        q, k = self._after(block, "q", q), self._after(block, "k", k)
        q, k = (_turned(part.transpose(1, 2), rotary) for part in (q, k))
        cache[0][:, :, self.past :] = k
        cache[1][:, :, self.past :] = v.transpose(1, 2)
        mask = self._masks.get(block.window)
        first = max(0, end - block.window) if block.window and mask is None else 0
        keys, values = (part[:, :, first:] for part in cache)
        found = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=shape.attention_scale, enable_gqa=True
        )
        out = self._unit(block.units["o"], found.transpose(1, 2).flatten(2))
        return self._after(block, "after_attention", out)

    def _mlp(self, block: Block, x: Tensor) -> Tensor:
        parts = self._parts(block, ("gate", "up"), self._norm(x, block.norms["mlp"]))
        if self.shape.activation == "silu":
            gate = functional.silu(parts["gate"])
        else:
            gate = functional.gelu(parts["gate"], approximate="tanh")
        out = self._unit(block.units["down"], gate * parts["up"])
        return self._after(block, "after_mlp", out)

    def _embedding(self, units: UnitParts) -> Tensor:
        matrix = self.shape.embedding.matrices[0]
        _, parts = units(self.shape.embedding)
        if parts is None:
            return torch.zeros(matrix.out_features, matrix.in_features, **self._like)
        rows: list[Any] = [p if isinstance(p, Tensor) else p.dequantize() for p in parts]
        return torch.cat(rows).to(**self._like)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values).to(**self._like)

    def _turns(self, block: Block, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, head_dim) cosines and sines, the halves of a head alike."""
        angles = positions[:, None] * torch.as_tensor(block.frequencies, dtype=torch.float64)
        angles = torch.cat([angles, angles], dim=1)
        scale = block.rotary_scale
        return self._tensor(angles.cos() * scale), self._tensor(angles.sin() * scale)

    def _mask(self, window: int | None) -> Tensor:
        query = torch.arange(self.past, self.regime.context)[:, None]
        key = torch.arange(self.regime.context)[None]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        return seen.to(self.ids.device)


class CudaModel:
    """A decoder with its step, and the stack of its launches, each as one graph."""

    def __init__(
        self,
        device: Device,
        shape: DecoderShape,
        units: UnitParts,
        vectors: Vectors,
        regime: Regime,
    ) -> None:
        self.decoder = TorchDecoder(device, shape, units, vectors, regime)
        self.step = GraphStep([self.decoder.step])
        launches = []
        for unit in forward_units(shape):
            rows = regime.batch if unit is shape.head else regime.rows
            x = random_input(rows, unit.matrices[0].in_features, torch.bfloat16, 0, "cuda")
            launches.append(_bound(self.decoder.linears[unit.name], x))
        self.stack = GraphStep(launches)

    def close(self) -> None:
        """Free the memory."""
        self.step.close()
        self.stack.close()
        del self.decoder


class GraphStep:
    """Launches that are replayed together."""

    def __init__(self, launches: list[Callable[[], Tensor]]) -> None:
        self._replay, self._count = Replay(launches), len(launches)
        until = time.perf_counter() + _WARM_SECONDS
        while time.perf_counter() < until:
            self._replay.sample()

    def sample(self) -> tuple[float, float]:
        """Nanoseconds of one run: between events on the device, and on the wall."""
        wall = time.perf_counter_ns()
        found = self._replay.sample() * self._count
        return found, time.perf_counter_ns() - wall

    def close(self) -> None:
        """Free the graph."""
        self._replay.close()


def forward_units(shape: DecoderShape) -> list[Unit]:
    """Units that are launched, in the order of a step."""
    inside = [
        unit
        for block in shape.blocks
        for unit in {unit.name: unit for unit in block.units.values()}.values()
    ]
    return [*inside, shape.head]


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(batch, heads, tokens, head_dim) turned by its positions."""
    cosines, sines = rotary
    low, high = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-high, low], dim=-1) * sines


def _bound(linear: Linear, x: Tensor) -> Callable[[], Tensor]:
    return lambda: linear(x)
