"""AWQ: columns that see large inputs are scaled up before rounding, and divided out before.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, section 3.2. With W' = W·diag(s) and x' = x / s the product is
the same, and the rounding error of column j is divided by s_j. s = r^α, r_j the root mean
square of input column j (the paper: its mean magnitude), scaled to √(max s · min s) = 1;
α is searched over 0, 0.05 … 0.95 for the least output error Σ Tr(Δ G Δᵀ) of the matrices
that read x, rounded to nearest.

The division costs nothing, because it goes into what makes x: the gain of a norm (of all
its readers, routers among them), the rows of the value projection before the output
projection (one s for all heads that share a value head), the rows of the up projection
before the down projection of a gated MLP. Other inputs, such as those of the head, of
fused value or up projections, or of stacked experts' down projections, stay as they are.

Differs from the paper: α serves all formats of a search, and is found for one of them,
the middle one by bytes; output errors are those of each matrix, not of the whole
attention; the paper's clipping search is part of rounding to nearest here.

Fails where inputs have no outstanding columns, and then does little. Cost: 20 roundings
of every matrix that is scaled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.models.flow import Norm, Reader, find_norms
from bitsearch.models.preparation import Preparation, Step
from bitsearch.models.weights import read_weight
from bitsearch.objectives.memory import available_bytes
from bitsearch.objectives.statistics import input_mean_squares, second_moments_in_turn
from bitsearch.preparations import Method, Scene
from bitsearch.quantizers.rtn import quantize
from bitsearch.units import Matrix, Unit

_GRID = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """An input that can be scaled.

    Attributes:
        unit: whose input it is.
        matrices: that are quantized and read it.
        readers: all parameters that read it.
        norm: that makes it; or None, and the matrix that does.
        source: that matrix.
        shared: of the inputs, (heads, times each is read, size); s is one for all times.
    """

    unit: Unit
    matrices: tuple[Matrix, ...]
    readers: tuple[Reader, ...]
    norm: Norm | None = None
    source: Matrix | None = None
    shared: tuple[int, int, int] | None = None


@torch.no_grad()
def find(scene: Scene) -> Preparation:
    """The scales of every input that can be scaled exactly."""
    model = scene.decoder.model
    steps: dict[str, list[Step]] = {}
    tensors: dict[str, Tensor] = {}

    def step(name: str, kind: str, axis: int, value: Tensor) -> None:
        key = f"{name}:{len(steps.get(name, ()))}"
        tensors[key] = value
        steps.setdefault(name, []).append(Step(kind, axis, key))  # type: ignore[arg-type]

    places = list(_places(scene))
    _, reached = input_mean_squares(scene.decoder, [p.unit for p in places], scene.tokens)
    places = [place for place in places if reached.get(place.unit.name)]
    if not places:
        raise BadInput(f"{type(model).__name__} has no input that 'awq' could scale exactly")
    room = available_bytes(scene.decoder.device) // 4
    units = [place.unit for place in places]
    moments = second_moments_in_turn(scene.decoder, units, scene.tokens, room)
    for done, (place, moment) in enumerate(zip(places, moments, strict=True)):
        scene.done(done, len(places))
        scale = _searched(scene, place, moment)
        if place.norm is not None:
            owner = place.norm.name
            gain = model.get_submodule(owner).weight + place.norm.offset
            weight, scale = _sixteen_bits(gain, scale, place.norm.offset, scene.layout.dtype)
            step(f"{owner}.weight", "set", 0, weight)
        for reader in place.readers:
            step(reader.parameter, "scale", reader.axis, scale)
        if place.norm is None:
            assert place.source is not None
            if place.shared is not None:
                scale = scale.reshape(place.shared)[:, 0].flatten()
            step(place.source.name, "scale", 1 if place.source.transposed else 0, 1 / scale)
            owner = place.source.module
        if getattr(model.get_submodule(owner), "bias", None) is not None:
            step(f"{owner}.bias", "scale", 0, 1 / scale)
    scene.done(len(places), len(places))
    return Preparation("awq", False, steps, tensors)


def _sixteen_bits(gain: Tensor, scale: Tensor, offset: float, dtype: str) -> tuple[Tensor, Tensor]:
    """The weight of a norm whose gain is divided by a scale, and that scale again.

    The weight is stored at 16 bits; the scale takes up what that rounds, so that the
    product is exact and a checkpoint is what was measured.
    """
    kept = torch.float16 if dtype == "float16" else torch.bfloat16
    weight = (gain / scale - offset).to(kept).float()
    exact = gain / (weight + offset)
    usable = exact.isfinite() & (exact > 0)
    return torch.where(usable, weight, gain / scale - offset), torch.where(usable, exact, scale)


def _places(scene: Scene) -> Iterator[_Place]:
    """Every input that can be scaled."""
    units = {m.name: unit for unit in scene.layout.units for m in unit.matrices}
    matrices = {m.name: m for unit in scene.layout.units for m in unit.matrices}
    for norm in find_norms(scene.decoder, scene.layout):
        inside = [r.parameter for r in norm.readers if r.parameter in units]
        if norm.foreign or not inside or units[inside[0]].block is None:
            continue
        yield _Place(units[inside[0]], tuple(matrices[n] for n in inside), norm.readers, norm)
    by_parent: dict[str, dict[str, Matrix]] = {}
    for matrix in matrices.values():
        if matrix.count == 1 and matrix.role:
            by_parent.setdefault(matrix.module.rpartition(".")[0], {})[matrix.role] = matrix
    for roles in by_parent.values():
        if {"attn.v", "attn.o"} <= roles.keys():
            shared = _heads(scene, roles["attn.v"], roles["attn.o"])
            if shared:
                yield _between(units, roles["attn.v"], roles["attn.o"], shared)
        if {"mlp.gate", "mlp.up", "mlp.down"} <= roles.keys():
            yield _between(units, roles["mlp.up"], roles["mlp.down"], None)


def _between(
    units: Mapping[str, Unit], source: Matrix, reader: Matrix, shared: tuple[int, int, int] | None
) -> _Place:
    axis = 0 if reader.transposed else 1
    readers = (Reader(reader.name, axis),)
    return _Place(units[reader.name], (reader,), readers, None, source, shared)


def _heads(scene: Scene, value: Matrix, output: Matrix) -> tuple[int, int, int] | None:
    """Value heads, attention heads of each, and their size."""
    config = scene.decoder.config
    heads = getattr(config, "num_attention_heads", 0)
    if not heads or output.in_features % heads:
        return None
    size = output.in_features // heads
    kept, rest = divmod(value.out_features, size)
    return None if rest or heads % kept else (kept, heads // kept, size)


def _searched(scene: Scene, place: _Place, moment: Tensor) -> Tensor:
    """(in,) scales with the least output error."""
    squares = moment.diagonal()
    if place.shared is not None:
        kept, times, size = place.shared
        mean = squares.reshape(place.shared).mean(1, keepdim=True)
        squares = mean.expand(kept, times, size).flatten()
    root = squares.clamp(min=1e-8 * float(squares.mean())).sqrt()
    best, found = torch.inf, torch.ones_like(root)
    format = _middle(scene.candidates, place.matrices[0])
    if format is None or not bool(root.isfinite().all()) or float(root.max()) == 0:
        return found
    weights = [read_weight(scene.decoder.model, matrix) for matrix in place.matrices]
    for index in range(_GRID):
        scale = root ** (index / _GRID)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in weights:
            rounded = quantize(weight * scale, format, moment.diagonal() / scale.square())
            change = rounded.dequantize().div_(scale).sub_(weight)
            error += float((change @ moment).mul_(change).sum())
        if error < best:
            best, found = error, scale
    return found


def _middle(candidates: tuple[Format, ...], matrix: Matrix) -> Format | None:
    """The format in the middle by bytes, of those that round and can store the rows."""
    shape = matrix.out_features, matrix.in_features
    lossy = [f for f in candidates if not f.exact and f.fits(matrix.in_features)]
    lossy.sort(key=lambda format: format.bytes(*shape))
    return lossy[(len(lossy) - 1) // 2] if lossy else None


METHOD = Method("activation-aware scales, folded into norms and linear layers", find, False)
