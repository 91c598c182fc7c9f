"""A model with every unit in a format, run on a device from token ids to logits.

A device with a decoder of its own runs it where it knows the family. Elsewhere the
model of transformers runs, and calls the device's kernels for its linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.kernels.devices import Assembled, Device, OwnDecoder
from bitsearch.kernels.regime import Regime
from bitsearch.models.decoder_shape import decoder_shape
from bitsearch.units import ModelLayout, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bitsearch.kernels.decoder_shape import DecoderShape
    from bitsearch.kernels.devices import Parts


@dataclass(frozen=True, slots=True)
class Weights:
    """The real weights of a model.

    Attributes:
        parts: a unit's matrices in a format.
        model: the model of transformers, for all that is not a unit.
    """

    parts: Callable[[Unit, Format], Parts]
    model: Any


def runtime(device: Device, layout: ModelLayout, config: PreTrainedConfig) -> str:
    """What runs the model from end to end: the device's name, or `transformers`."""
    return "transformers" if _own_shape(device, layout, config) is None else device.name


def assemble(
    device: Device,
    layout: ModelLayout,
    config: PreTrainedConfig,
    choice: Sequence[tuple[Unit, Format]],
    regime: Regime,
    weights: Weights | None = None,
) -> Assembled:
    """The model in the formats of a choice, ready to be timed in a regime.

    Args:
        device: what runs it.
        layout: of the model.
        config: of the model.
        choice: every unit with its format.
        regime: of its steps.
        weights: the model's own; None draws random ones, on which no time depends.

    Raises:
        NoKernel: the device has no kernel for a unit in its format.
        BadInput: the model cannot run in this regime.
    """
    check_context(layout, config, regime)
    formats = {unit.name: format for unit, format in choice}
    shape = _own_shape(device, layout, config)

    def units(unit: Unit) -> tuple[str, Parts | None]:
        format = formats[unit.name]
        return format.name, None if weights is None else weights.parts(unit, format)

    if shape is not None and isinstance(device, OwnDecoder):
        return device.decoder(shape, units, _vectors(layout, weights), regime)
    from bitsearch.objectives.cost.in_transformers import InTransformers

    model = None if weights is None else weights.model
    return InTransformers(device, layout, config, units, regime, model)


def longest_context(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model takes, where its configuration says so."""
    text = config.get_text_config(decoder=True)
    limit: int | None = getattr(text, "max_position_embeddings", None)
    return limit


def check_context(layout: ModelLayout, config: PreTrainedConfig, regime: Regime) -> None:
    """Refuse a regime of more tokens than the model takes.

    Raises:
        BadInput: it has more.
    """
    limit = longest_context(config)
    if limit is not None and regime.context > limit:
        raise BadInput(
            f"{layout.reference} takes at most {limit} tokens, not {regime.context}; "
            "give a shorter context"
        )


def _own_shape(
    device: Device, layout: ModelLayout, config: PreTrainedConfig
) -> DecoderShape | None:
    if isinstance(device, OwnDecoder):
        with suppress(BadInput):
            return decoder_shape(layout, config)
    return None


def _vectors(layout: ModelLayout, weights: Weights | None) -> Callable[[str], NDArray[np.float32]]:
    """Norms and biases by name; ones where there are no weights."""

    def of(name: str) -> NDArray[np.float32]:
        if weights is None:
            return np.ones(layout.kept[name], np.float32)
        values: NDArray[np.float32] = (
            weights.model.get_parameter(name).detach().float().cpu().numpy()
        )
        return values

    return of
