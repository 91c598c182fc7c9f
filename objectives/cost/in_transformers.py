"""A model of transformers whose linear layers are launches of a device.

Members of a fused set share one launch: the first that is called runs it, the others
take their rows of its result. All else is torch, its overhead in Python included.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitsearch.errors import BadInput
from bitsearch.kernels.devices import Device
from bitsearch.kernels.regime import Regime, is_launched, launch_of
from bitsearch.units import ModelLayout, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bitsearch.kernels.devices import Linear, UnitParts


class InTransformers:
    """The step of a regime, and the stack of its launches.

    Args:
        device: what runs the launches.
        layout: of the model.
        config: of the model.
        units: a unit's format name and its matrices.
        regime: of the steps.
        model: with real weights, left as it is; None makes one with random ones.
    """

    def __init__(
        self,
        device: Device,
        layout: ModelLayout,
        config: PreTrainedConfig,
        units: UnitParts,
        regime: Regime,
        model: Any,
    ) -> None:
        dtype = getattr(torch, device.dtype)
        self.model = _random(config, dtype) if model is None else copy.deepcopy(model)
        self.model = self.model.to(device=device.place, dtype=dtype).eval()
        tied = bool(layout.tied)
        launches: list[tuple[Linear, Tensor]] = []
        for unit in layout.units:
            if not is_launched(unit, tied):
                continue
            name, parts = units(unit)
            launch = launch_of(unit, name, regime)
            shared = _Shared(device.linear(launch, parts), unit)
            launches.append(
                (shared.linear, torch.randn(launch.m, launch.k).to(device.place, dtype))
            )
            _replace(self.model, unit, shared)
        # The tied head comes first among the units, and last in a step.
        if tied:
            launches.append(launches.pop(0))
        self.step = TransformersStep(device, self.model, regime)
        self.stack = Stack(device, launches)

    def close(self) -> None:
        """Free the memory."""
        self.step.close()
        self.stack.close()
        del self.model


class TransformersStep:
    """One forward pass on a cache that holds what came before."""

    def __init__(self, device: Device, model: Any, regime: Regime) -> None:
        from transformers import DynamicCache

        self._device, self._model = device, model
        self._ids = torch.zeros(regime.batch, regime.tokens, dtype=torch.long, device=device.place)
        self.cache: Any = DynamicCache(config=model.config)
        past = regime.context - regime.tokens
        if past:
            text = model.config.get_text_config(decoder=True)
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            seen = torch.randn(regime.batch, heads, past, width).to(device.place, model.dtype)
            for layer in range(text.num_hidden_layers):
                self.cache.update(seen.clone(), seen.clone(), layer)

    @torch.no_grad()
    def run(self, ids: Tensor, cache: Any) -> Tensor:
        """(batch, tokens) ids to (batch, vocabulary) logits of each last token."""
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def sample(self) -> tuple[float, float]:
        """Nanoseconds of one run, on the device's clock and on the wall's."""
        cache = copy.deepcopy(self.cache)  # a run appends to it
        wall, start = time.perf_counter_ns(), self._device.now()
        self.run(self._ids, cache)
        return self._device.now() - start, time.perf_counter_ns() - wall

    def close(self) -> None:
        """Let go of the cache."""
        self.cache = None


class Stack:
    """Launches one after another, each on its own inputs."""

    def __init__(self, device: Device, launches: list[tuple[Linear, Tensor]]) -> None:
        self._device, self._launches = device, launches

    def sample(self) -> tuple[float, float]:
        """Nanoseconds of one run, on the device's clock and on the wall's."""
        wall, start = time.perf_counter_ns(), self._device.now()
        for linear, x in self._launches:
            linear(x)
        return self._device.now() - start, time.perf_counter_ns() - wall

    def close(self) -> None:
        """Let go of the weights."""
        self._launches = []


class _Shared:
    """One launch for all members of a unit."""

    def __init__(self, linear: Linear, unit: Unit) -> None:
        self.linear, self._unit = linear, unit
        self._seen: Tensor | None = None
        self._parts: list[Tensor] = []

    def part(self, x: Tensor, index: int) -> Tensor:
        """A member's rows of the result, computed once for one input."""
        if x is not self._seen:
            y = self.linear(x.reshape(-1, x.shape[-1]))
            sizes = [matrix.out_features for matrix in self._unit.matrices]
            self._parts = list(y.reshape(*x.shape[:-1], -1).split(sizes, dim=-1))
            self._seen = x
        found = self._parts[index]
        if index == len(self._unit.matrices) - 1:
            self._seen = None  # another step may come with the same tensor
        return found


class _Member(nn.Module):
    """A linear layer that takes its result from a launch."""

    def __init__(self, shared: _Shared, index: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._shared, self._index, self._bias = shared, index, bias

    def forward(self, x: Tensor) -> Tensor:
        found = self._shared.part(x, self._index)
        return found if self._bias is None else found + self._bias


def _replace(model: Any, unit: Unit, shared: _Shared) -> None:
    """Put a unit's members in the place of the model's own modules."""
    for index, matrix in enumerate(unit.matrices):
        if unit.kind in ("embedding", "head"):
            head = model.get_output_embeddings()
            model.set_output_embeddings(_Member(shared, index, getattr(head, "bias", None)))
            continue
        owner, _, leaf = matrix.module.rpartition(".")
        module = model.get_submodule(matrix.module)
        setattr(
            model.get_submodule(owner), leaf, _Member(shared, index, getattr(module, "bias", None))
        )


def _random(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model of a configuration, with random weights.

    Raises:
        BadInput: it cannot be made.
    """
    from transformers import AutoModelForCausalLM

    from bitsearch.models.load import quiet

    factory: Any = AutoModelForCausalLM
    try:
        with quiet():
            return factory.from_config(copy.deepcopy(config), dtype=dtype)
    except (MemoryError, RuntimeError, ValueError) as error:
        raise BadInput(f"no model of this configuration can be made: {error}") from error
