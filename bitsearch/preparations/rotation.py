"""Rotations of the residual stream and of value heads that weights absorb exactly.

With every norm's gain moved into its readers, RMSNorm commutes with an orthogonal R: the
embedding and all that writes to the residual stream gain R on their outputs, all that
reads it R on their inputs, and the model stays the same function (Ashkboos et al.,
"SliceGPT", ICLR 2024, section 3, theorem 1). Value heads are rotated in each head's own
space between the value and the output projection, which attention leaves alone.

Not possible where a norm subtracts the mean, or stands after a layer (its gain acts in
the old basis), and where head and embedding are one matrix: the last gain is in the head
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.models.flow import Norm, find_norms
from bitsearch.models.preparation import Preparation, Step
from bitsearch.preparations import Scene
from bitsearch.units import Matrix

_WRITERS = ("attn.o", "mlp.down", "mlp.fc2", "experts.down")
_RESIDUAL, _VALUES, _UNIT = "residual", "values", "unit_gain"


def head_size(scene: Scene) -> int | None:
    """The size of a value head; None where value and output projections are not matrices."""
    config = scene.decoder.config
    outputs = {m.in_features for m in _matrices(scene).values() if m.role == "attn.o"}
    heads = getattr(config, "num_attention_heads", 0)
    if len(outputs) != 1 or not heads or not any(pairs(scene)):
        return None
    size, rest = divmod(outputs.pop(), heads)
    return None if rest else size


@torch.no_grad()
def rotated(
    method: str, scene: Scene, residual: Tensor, values: Tensor | Mapping[str, Tensor] | None
) -> Preparation:
    """A preparation that rotates the residual stream, and value heads.

    Args:
        method: its name.
        scene: the model, its head untied.
        residual: (width, width) orthogonal R; a state h, as a row, becomes h R.
        values: (head size, head size) orthogonal, the same for all heads; or (value heads,
            head size, head size) by the name of the output projection; None for none.

    Raises:
        BadInput: the model cannot be rotated exactly; the message names what is in the way.
    """
    model: Any = scene.decoder.model
    width = len(residual)
    steps: dict[str, list[Step]] = {}
    tensors: dict[str, Tensor] = {_RESIDUAL: residual}

    def step(name: str, *what: Any) -> None:
        steps.setdefault(name, []).append(Step(*what))

    norms = [norm for norm in find_norms(scene.decoder, scene.layout) if norm.width == width]
    matrices = _matrices(scene)
    _check(type(model).__name__, model, norms, matrices)
    for norm in norms:
        gain = model.get_submodule(norm.name).weight + norm.offset
        tensors[f"{norm.name}:gain"] = gain
        for reader in norm.readers:
            step(reader.parameter, "scale", reader.axis, f"{norm.name}:gain")
            step(reader.parameter, "rotate", reader.axis, _RESIDUAL)
        tensors[_UNIT] = torch.full_like(gain, 1 - norm.offset)
        step(f"{norm.name}.weight", "set", 0, _UNIT)
    step(scene.layout.units[0].matrices[0].name, "rotate", 1, _RESIDUAL)
    for matrix in matrices.values():
        if matrix.role in _WRITERS:
            axis = model.get_parameter(matrix.name).dim() - (1 if matrix.transposed else 2)
            step(matrix.name, "rotate", axis, _RESIDUAL)
            if (bias := _bias(model, matrix)) is not None:
                step(bias, "rotate", model.get_parameter(bias).dim() - 1, _RESIDUAL)
    if values is not None:
        _rotate_values(scene, values, tensors, step)
    return Preparation(method, True, steps, tensors)


def _rotate_values(
    scene: Scene, values: Tensor | Mapping[str, Tensor], tensors: dict[str, Tensor], step: Any
) -> None:
    """Add the tensors, and the steps of value and output projections."""
    if isinstance(values, Tensor):
        tensors[_VALUES] = values
    for value, output in pairs(scene):
        inside = outside = _VALUES
        if not isinstance(values, Tensor):
            inside, outside = (f"{_VALUES}:{matrix.name}" for matrix in (value, output))
            tensors[inside] = values[output.name]
            times = output.in_features // value.out_features  # that each value head is read
            tensors[outside] = values[output.name].repeat_interleave(times, 0)
        step(value.name, "rotate", 1 if value.transposed else 0, inside)
        step(output.name, "rotate", 0 if output.transposed else 1, outside)
        if (bias := _bias(scene.decoder.model, value)) is not None:
            step(bias, "rotate", 0, inside)


def _check(name: str, model: Any, norms: list[Norm], matrices: Mapping[str, Matrix]) -> None:
    """Refuse what a rotation would change."""
    why = f"{name} cannot be rotated exactly"
    for norm in norms:
        if norm.centred:
            raise BadInput(f"{why}: {norm.name} subtracts the mean of its input")
        if getattr(model.get_submodule(norm.name), "bias", None) is not None:
            raise BadInput(f"{why}: {norm.name} adds a bias")
        if norm.foreign:
            raise BadInput(f"{why}: how {norm.foreign} reads {norm.name} is not known")
        if not norm.readers:
            raise BadInput(f"{why}: {norm.name} stands after a layer and keeps its gain there")
    if not norms:
        raise BadInput(f"{why}: it has no norm with a gain")
    read = {reader.parameter for norm in norms for reader in norm.readers}
    for matrix in matrices.values():
        if matrix.role not in (*_WRITERS, "embedding") and matrix.name not in read:
            raise BadInput(f"{why}: what {matrix.name} reads, or writes to, is not known")


def _matrices(scene: Scene) -> dict[str, Matrix]:
    return {m.name: m for unit in scene.layout.units for m in unit.matrices}


def pairs(scene: Scene) -> list[tuple[Matrix, Matrix]]:
    """Value and output projections of each attention."""
    parts: dict[str, dict[str, Matrix]] = {}
    for matrix in _matrices(scene).values():
        parts.setdefault(matrix.module.rpartition(".")[0], {})[matrix.role] = matrix
    return [
        (roles["attn.v"], roles["attn.o"])
        for roles in parts.values()
        if {"attn.v", "attn.o"} <= roles.keys()
    ]


def _bias(model: Any, matrix: Matrix) -> str | None:
    """The bias that is added to a matrix's outputs."""
    leaf = matrix.name.rpartition(".")[2]
    name = f"{matrix.module}.bias" if leaf == "weight" else f"{matrix.name}_bias"
    module = model.get_submodule(matrix.module)
    return name if getattr(module, name.rpartition(".")[2], None) is not None else None
