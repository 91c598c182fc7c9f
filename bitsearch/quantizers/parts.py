"""The packed tensors of a format in two parts, each under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def outer(part: str, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, as the whole names them: `codes` -> `PART.codes`."""
    return {f"{part}.{name}": tensor for name, tensor in packed.items()}


def inner(part: str, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `outer`, from the tensors of the whole."""
    return {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in packed.items()
        if name.startswith(f"{part}.")
    }
