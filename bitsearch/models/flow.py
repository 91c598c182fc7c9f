"""Which matrices read the output of a norm: seen in a forward pass, whatever the family.

A norm scales each of its outputs by a gain. Where every reader of the output is known,
a factor can move between the gain and the readers' columns, and the model stays the
same function. What is no module with a matrix of its own cannot be seen reading;
whoever moves factors compares the model's logits afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsearch.models.decoder import Decoder
from bitsearch.units import ModelLayout


@dataclass(frozen=True, slots=True)
class Reader:
    """A parameter that is multiplied with what a module puts out.

    Attributes:
        parameter: its full name.
        axis: of the parameter, that runs along the inputs.
    """

    parameter: str
    axis: int


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm with a gain.

    Attributes:
        name: of the module; the gain is `NAME.weight`, or 1 + that.
        width: number of outputs.
        offset: 0, or the 1 that the gain has besides the weight (Gemma).
        centred: whether it subtracts the mean, as LayerNorm does.
        readers: of its output.
        foreign: a module that reads the output in an unknown way; empty if there is none.
    """

    name: str
    width: int
    offset: float
    centred: bool
    readers: tuple[Reader, ...]
    foreign: str = ""


@torch.no_grad()
def find_norms(decoder: Decoder, layout: ModelLayout) -> tuple[Norm, ...]:
    """Every norm that has a gain, in the order in which they run.

    Args:
        decoder: the model; runs on a few tokens.
        layout: its structure.
    """
    model: nn.Module = decoder.model
    gains = {name: module for name, module in model.named_modules() if _has_gain(module)}
    read: dict[str, list[str]] = {}  # modules by norm, both in order
    outputs: list[tuple[Tensor, str]] = []  # kept, so that no address is used twice

    def put_out(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            read.setdefault(name, [])
            outputs.append((output, name))

    def take_in(name: str, state: Any) -> None:
        for output, norm in reversed(outputs):
            if isinstance(state, Tensor) and _same(state, output):
                if name not in read[norm]:
                    read[norm].append(name)
                return

    matrices = {m.module: m.name for unit in layout.units for m in unit.matrices}
    with _watching(model, gains, matrices.keys() | _with_matrices(model), put_out, take_in):
        tokens = torch.arange(4, device=decoder.device)[None]
        decoder.logits(decoder.hidden(tokens))
    found = []
    for name, modules in read.items():
        offset_and_centred = _probed(gains[name])
        if offset_and_centred is None:
            continue
        width = gains[name].weight.numel()
        readers = {module: _readers(model, module, width, layout) for module in modules}
        found.append(
            Norm(
                name,
                width,
                *offset_and_centred,
                tuple(reader for some in readers.values() for reader in some),
                next((module for module, some in readers.items() if not some), ""),
            )
        )
    return tuple(found)


def _has_gain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor)


def _with_matrices(model: nn.Module) -> set[str]:
    """Modules with a matrix of their own, or a stack of them."""
    return {
        name
        for name, module in model.named_modules()
        if any(parameter.dim() in (2, 3) for parameter in module.parameters(recurse=False))
    }


@contextmanager
def _watching(
    model: nn.Module, gains: Any, matrices: set[str], put_out: Any, take_in: Any
) -> Iterator[None]:
    """Call `put_out` after each norm, `take_in` before each module with a matrix."""
    hooks = []
    for name in gains:
        hooks.append(
            gains[name].register_forward_hook(
                lambda _, args, output, name=name: put_out(name, output)
            )
        )
    for name in matrices:
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, name=name: take_in(
                    name, args[0] if args else next(iter(kwargs.values()), None)
                ),
                with_kwargs=True,
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _same(state: Tensor, output: Tensor) -> bool:
    """Whether they are the same numbers in memory, in whatever shape."""
    return state.data_ptr() == output.data_ptr() and state.numel() == output.numel()


def _readers(model: nn.Module, module: str, width: int, layout: ModelLayout) -> tuple[Reader, ...]:
    """The parameters of a module that multiply its input; none if that is unknown."""
    inside = [m for unit in layout.units for m in unit.matrices if m.module == module]
    if first := [m for m in inside if not m.role.endswith(".down") or len(inside) == 1]:
        if any(m.in_features != width for m in first):
            return ()
        axes = [model.get_parameter(m.name).dim() - (2 if m.transposed else 1) for m in first]
        return tuple(Reader(m.name, axis) for m, axis in zip(first, axes, strict=True))
    own = dict(model.get_submodule(module).named_parameters(recurse=False))
    inner = [name for name, parameter in own.items() if parameter.dim() == 2]
    if len(inner) == 1 and own[inner[0]].shape[1] == width:  # a head, or a router
        return (Reader(f"{module}.{inner[0]}", 1),)
    return ()


def _probed(norm: Any) -> tuple[float, bool] | None:
    """Offset of the gain, and whether the mean is subtracted; None if neither is clear."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    kept = weight.clone()
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 2, weight.numel(), generator=generator).to(weight)
    shift = 0 if bias is None else bias
    try:
        if weight.dim() != 1:
            return None
        whole = norm(state) - shift
        moved = norm(state + 3.0) - shift
        weight.zero_()
        none = norm(state) - shift
        weight.fill_(1)
        one = norm(state) - shift
    except (RuntimeError, TypeError):
        return None
    finally:
        weight.copy_(kept)
    plain = one - none  # the normalized state
    offset = 0.0 if _close(none, torch.zeros_like(none)) else 1.0
    if not _close(none, offset * plain) or not _close(whole, (offset + kept) * plain):
        return None
    return offset, _close(moved, whole)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3)
