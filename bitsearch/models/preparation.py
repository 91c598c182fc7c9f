"""Preparations: exact changes of a model's weights, made before anything is measured.

A prepared model is the same function with other weights, such as ones that round better:
a factor moves from one matrix into its neighbour, or a rotation and its inverse cancel.
A preparation says for every parameter what happens to it, so that it is repeated alike on
a whole model and on one tensor read from a file. It is found once for a run, stored with
it, and named in the policy.

The file is safetensors: the vectors and rotations by key, and in the metadata the schema,
the method, whether the head is untied, and the steps of each parameter as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.models.reason import reason
from bitsearch.models.weights import Parameters
from bitsearch.models.writing import file_parts

SCHEMA = "bitsearch.preparation/1"


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a parameter P along an axis, by a tensor T of the preparation.

    Attributes:
        kind: `scale`: each slice times its entry of T, (n,). `rotate`: with P cut into
            blocks of n along the axis, P[…, j, …] ← Σ_i P[…, i, …] T[i, j], T (n, n), or
            (blocks, n, n) with one for each. `set`: P ← T.
        axis: of the parameter.
        key: names T.
    """

    kind: Literal["scale", "rotate", "set"]
    axis: int
    key: str


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is done to a model, found by a method on calibration text.

    Attributes:
        method: its name.
        untied: the head gets a matrix of its own, beginning as a copy of the embedding.
        steps: of each parameter that changes, in order.
        tensors: float32, by key.
    """

    method: str
    untied: bool
    steps: Mapping[str, Sequence[Step]]
    tensors: Mapping[str, Tensor]

    def changed(self, name: str, parameter: Tensor) -> Tensor:
        """What becomes of a parameter; itself if nothing does."""
        for step in self.steps.get(name, ()):
            tensor = self.tensors[step.key].to(parameter.device)
            if step.kind == "set":
                parameter = tensor.to(parameter.dtype)
                continue
            last = parameter.movedim(step.axis, -1)
            if step.kind == "scale":
                last = last.float() * tensor
            else:
                blocks = last.float().unflatten(-1, (-1, tensor.shape[-1]))
                product = "...bi,ij->...bj" if tensor.dim() == 2 else "...bi,bij->...bj"
                last = torch.einsum(product, blocks, tensor).flatten(-2)
            parameter = last.movedim(-1, step.axis).to(parameter.dtype)
        return parameter

    @torch.no_grad()
    def apply(self, model: Any) -> None:
        """Change a model in place; its head must be untied already if that is asked.

        Raises:
            BadInput: the model has not these parameters.
        """
        for name in self.steps:
            try:
                parameter = model.get_parameter(name)
                parameter.copy_(self.changed(name, parameter))
            except (AttributeError, RuntimeError) as error:
                raise BadInput(
                    f"the preparation '{self.method}' does not fit this model: {reason(error)}"
                ) from error

    def parts(self) -> Iterator[bytes]:
        """The content of its file, piece by piece."""
        steps = {name: [[s.kind, s.axis, s.key] for s in some] for name, some in self.steps.items()}
        metadata = {
            "schema": SCHEMA,
            "method": self.method,
            "untied": json.dumps(self.untied),
            "steps": json.dumps(steps),
        }
        return file_parts({key: tensor.float() for key, tensor in self.tensors.items()}, metadata)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The parameters of a model as a preparation makes them, each when it is asked for.

    Attributes:
        stored: the parameters of the model as it is.
        preparation: what is done to them.
    """

    stored: Parameters
    preparation: Preparation

    def get_parameter(self, target: str) -> Tensor:
        """The parameter of a name, changed."""
        return self.preparation.changed(target, self.stored.get_parameter(target))


def load_preparation(path: Path) -> Preparation:
    """Read a preparation from its file.

    Raises:
        BadInput: missing, damaged, or of another schema.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("schema") != SCHEMA:
                raise BadInput(f"{path} has schema {header.get('schema')!r}, not {SCHEMA!r}")
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys}
        steps = {
            name: [Step(kind, axis, key) for kind, axis, key in some]
            for name, some in json.loads(header["steps"]).items()
        }
        if any(step.key not in tensors for some in steps.values() for step in some):
            raise ValueError("a tensor is missing")
        return Preparation(header["method"], json.loads(header["untied"]), steps, tensors)
    except (LookupError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise BadInput(f"preparation {path} cannot be read: {reason(error)}") from error
