"""Principal directions of the inputs, put last and mixed among themselves, fused into the weights.

ResQ (Saxena et al., "ResQ: Mixed-Precision Quantization of Large Language Models with
Low-Rank Residuals", ICML 2025, section 4): the error of outputs is least when the subspace
in high precision holds most of the inputs' energy, so it is spanned by the eigenvectors
of the largest eigenvalues of their second moment. With P the eigenvectors, the largest
eighth last, the rotation is P · diag(R₁, R₂) with random Hadamard matrices (orthogonal
ones where none is known) that mix each part for itself.

One basis serves the residual stream, of the summed second moments of all normalized
states; each value head has its own, of what the output projection reads. Both go into the
weights exactly and cost nothing at run time but a head of its own where it was tied. Then
the eighth of largest inputs is kept in 8 bits by `+int8x12.5%`, which finds it by itself
and counts an index for each of its columns, as the paper need not.

The rotations that need an operation at run time (of keys, and of the down projection's
input, whose columns `+int8x12.5%` takes as they are) are not made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitsearch.models.flow import find_norms
from bitsearch.models.preparation import Preparation
from bitsearch.objectives.statistics import observed, run_through
from bitsearch.preparations import Method, Scene
from bitsearch.preparations.hadamard import randomized
from bitsearch.preparations.rotation import head_size, pairs, rotated
from bitsearch.units import Unit

SHARE = 8  # one direction of so many is kept apart


@torch.no_grad()
def find(scene: Scene) -> Preparation:
    """The bases of the residual stream and of the value heads."""
    generator = torch.Generator().manual_seed(scene.seed)
    residual = principal_last(residual_moment(scene), generator)
    size = head_size(scene)
    values = None if size is None else _value_bases(scene, size, generator)
    return rotated("resq", scene, residual, values)


def principal_last(moment: Tensor, generator: torch.Generator) -> Tensor:
    """(n, n) float32 orthogonal: directions of the least second moment, then of the largest.

    Args:
        moment: (n, n) second moment.
        generator: of the rotation inside each part.
    """
    order = len(moment)
    high = -(-order // SHARE)
    basis = torch.linalg.eigh(moment.double().cpu()).eigenvectors  # ascending
    parts = [_mixing(count, generator) for count in (order - high, high)]
    found: Tensor = basis @ torch.block_diag(*parts)
    return found.float()


def _mixing(order: int, generator: torch.Generator) -> Tensor:
    """(n, n) float64 random orthogonal."""
    found = randomized(order, generator)
    if found is None:
        drawn = torch.randn(order, order, generator=generator, dtype=torch.float64)
        found = torch.linalg.qr(drawn).Q
    return found.double()


def residual_moment(scene: Scene) -> Tensor:
    """(width, width) Σ x̂ x̂ᵀ over norms and tokens, x̂ normalized and without the gain."""
    decoder = scene.decoder
    width = decoder.config.hidden_size
    total = torch.zeros(width, width, device=decoder.device)

    def see(module: Any, args: Any) -> None:
        rows = args[0].detach().float().flatten(0, -2)
        rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        total.addmm_(rows.mT, rows)

    with _before_norms(scene, width, see):
        run_through(decoder, scene.layout.units, scene.tokens)
    return total


@contextmanager
def _before_norms(scene: Scene, width: int, see: Any) -> Iterator[None]:
    """Call `see(module, args)` before each norm of the residual stream that matrices read."""
    model: Any = scene.decoder.model
    norms = [n for n in find_norms(scene.decoder, scene.layout) if n.width == width and n.readers]
    hooks = [model.get_submodule(norm.name).register_forward_pre_hook(see) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _value_bases(scene: Scene, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """(value heads, size, size) by output projection, from what these read."""
    heads = {output.name: value.out_features // size for value, output in pairs(scene)}
    units = {u.matrices[0].name: u for u in scene.layout.units if u.matrices[0].name in heads}
    moments: dict[str, Tensor] = {}

    def see(unit: Unit, rows: Tensor) -> None:
        name = unit.matrices[0].name
        # query heads that read the same value head are summed
        parts = rows.float().unflatten(1, (heads[name], -1, size))
        product = torch.einsum("thri,thrj->hij", parts, parts)
        moments[name] = moments[name] + product if name in moments else product

    with observed(scene.decoder, units.values(), see):
        run_through(scene.decoder, units.values(), scene.tokens)
    return {
        name: torch.stack([principal_last(one, generator) for one in moment])
        for name, moment in moments.items()
    }


METHOD = Method("ResQ: principal directions of the inputs put last, fused", find, True)
