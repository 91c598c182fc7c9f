"""Input statistics of every unit, gathered in forward passes.

The mean square of each input column, h_j = (1/T) Σ_t x_tj², weighs the
quantizer's error; it is the diagonal of the second moment of the inputs,
G = (1/T) Σ_t x_t x_tᵀ, which some quantizers need as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitsearch.models.decoder import Decoder
from bitsearch.units import Unit


def input_module(decoder: Decoder, unit: Unit) -> nn.Module | None:
    """The module whose input a unit's weights multiply; None if there is none to see.

    An embedding is looked up, but multiplied where it serves as a tied head.
    The down projections of fused experts multiply what lies inside the module;
    their shape does not tell, where the experts are as wide as the model.
    """
    matrix = unit.matrices[0]
    if unit.kind == "experts" and matrix.role.endswith(".down"):
        return None
    if unit.kind != "embedding":
        module: nn.Module = decoder.model.get_submodule(matrix.module)
        return module
    weight = decoder.model.get_parameter(matrix.name)
    return decoder.head if decoder.head.weight is weight else None


@contextmanager
def observed(
    decoder: Decoder, units: Iterable[Unit], see: Callable[[Unit, Tensor], None]
) -> Iterator[None]:
    """Call `see(unit, rows)` with the (tokens, in) input of each unit in each forward."""

    def hook(unit: Unit) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, kwargs: Any) -> None:
            state = args[0] if args else next(iter(kwargs.values()))
            if state.shape[-1] == unit.matrices[0].in_features:
                see(unit, state.detach().flatten(0, -2))

        return seen

    hooks = []
    for unit in units:
        module = input_module(decoder, unit)
        if module is not None:
            hooks.append(module.register_forward_pre_hook(hook(unit), with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def input_mean_squares(
    decoder: Decoder, units: Iterable[Unit], tokens: Tensor
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Mean squares of input columns, and how many tokens reached each unit.

    Args:
        decoder: the model.
        units: whose inputs to watch.
        tokens: (windows, length) calibration tokens, taken one window at a time.

    Returns:
        (in,) float32 by matrix name, for matrices whose input was seen; the down
        projections inside fused experts and untied embeddings are absent, and so
        is what no token reached. Tokens seen by unit name, 0 where none came.
    """
    units = list(units)
    sums: dict[str, Tensor] = {}
    counts = {unit.name: 0 for unit in units if input_module(decoder, unit) is not None}

    def add(unit: Unit, rows: Tensor) -> None:
        squares = rows.float().square().sum(0)
        if unit.name in sums:
            sums[unit.name] += squares
        else:
            sums[unit.name] = squares
        counts[unit.name] += len(rows)

    with observed(decoder, units, add):
        run_through(decoder, units, tokens)
    means = {
        matrix.name: sums[unit.name] / counts[unit.name]
        for unit in units
        if counts.get(unit.name)
        for matrix in unit.matrices
    }
    return means, counts


@torch.no_grad()
def input_second_moments(
    decoder: Decoder, units: Iterable[Unit], tokens: Tensor
) -> dict[str, Tensor]:
    """G of shape (in, in), float32, by unit name, where inputs are seen.

    Args:
        decoder: the model.
        units: whose inputs to watch; all their moments are in memory at once.
        tokens: (windows, length) calibration tokens, taken one window at a time.
    """
    units = list(units)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(unit: Unit, rows: Tensor) -> None:
        rows, name = rows.float(), unit.name
        sums[name] = sums[name].addmm_(rows.mT, rows) if name in sums else rows.mT @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    with observed(decoder, units, add):
        run_through(decoder, units, tokens)
    return {name: total.div_(counts[name]) for name, total in sums.items() if counts[name]}


def second_moments_in_turn(
    decoder: Decoder, units: Sequence[Unit], tokens: Tensor, room: int
) -> Iterator[Tensor]:
    """The second moments of units in order, as many a pass as `room` bytes hold.

    Args:
        decoder: the model.
        units: whose inputs are seen and reached; see `input_mean_squares`.
        tokens: (windows, length) calibration tokens; each pass runs all of them.
        room: bytes for the moments of one pass; one at least is gathered.
    """
    pending = list(units)
    while pending:
        group = [pending.pop(0)]
        used = 4 * group[0].matrices[0].in_features ** 2
        while pending and (used := used + 4 * pending[0].matrices[0].in_features ** 2) < room:
            group.append(pending.pop(0))
        moments = input_second_moments(decoder, group, tokens)
        for unit in group:
            yield moments.pop(unit.name)


def run_through(decoder: Decoder, units: Iterable[Unit], tokens: Tensor) -> None:
    """Run windows one by one, through the head only if a unit's input is seen there."""
    to_head = any(input_module(decoder, unit) is decoder.head for unit in units)
    for window in tokens.to(decoder.device):
        hidden = decoder.hidden(window[None])
        if to_head:
            decoder.head(hidden)
