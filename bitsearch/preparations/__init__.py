"""Exact changes of a model before it is quantized, by name: (scene) -> Preparation.

Each moves factors between neighbouring matrices, or rotates what lies between them, so
that weights round better; none adds an operation. The model's logits are compared before
and after: what is not the same function is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from bitsearch import registry
from bitsearch.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.formats import Format
    from bitsearch.models.decoder import Decoder
    from bitsearch.models.preparation import Preparation
    from bitsearch.units import ModelLayout

GROUP = "bitsearch.preparations"

PREPARATIONS = {
    "awq": "bitsearch.preparations.awq:METHOD",
    "hadamard": "bitsearch.preparations.hadamard:METHOD",
    "resq": "bitsearch.preparations.resq:METHOD",
}
_TOKENS = 32
_TOLERANCE = 1e-3  # of the largest logit; float32 rounding is a hundredth of that


@dataclass(frozen=True, slots=True)
class Scene:
    """What a preparation is found on.

    Attributes:
        decoder: the model in float32, its head untied if the method asks for that.
        layout: its structure.
        candidates: the formats that units may take.
        tokens: (windows, length) calibration tokens.
        seed: of everything that is drawn at random.
        done: called with finished and all steps.
    """

    decoder: Decoder
    layout: ModelLayout
    candidates: tuple[Format, ...]
    tokens: Tensor
    seed: int
    done: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prepare a model.

    Attributes:
        about: one line.
        find: what is to be done to the model of a scene, which it leaves as it is.
        unties: it needs a head with a matrix of its own.
    """

    about: str
    find: Callable[[Scene], Preparation]
    unties: bool


def load_method(name: str) -> Method:
    """The preparation of a name.

    Raises:
        UsageError: no such preparation.
    """
    return cast(Method, registry.load(GROUP, PREPARATIONS, name))


def prepare(name: str, scene: Scene) -> Preparation:
    """Find a preparation and apply it to the model of the scene.

    Raises:
        UsageError: no such preparation.
        BadInput: it cannot be made on this model, or would change what it computes.
    """
    decoder = scene.decoder
    tokens = scene.tokens[:1, :_TOKENS].to(decoder.device)
    before = decoder.logits(decoder.hidden(tokens))
    preparation = load_method(name).find(scene)
    preparation.apply(decoder.model)
    after = decoder.logits(decoder.hidden(tokens))
    if not float((after - before).abs().max()) <= _TOLERANCE * float(before.abs().max()):
        raise BadInput(
            f"{type(decoder.model).__name__} is not supported by the preparation '{name}', which "
            "would change what it computes; leave --prepare away"
        )
    return preparation
