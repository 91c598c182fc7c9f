"""The model's weights under any assignment of candidates, and back again."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.models.weights import Parameters, all_finite, read_weight, write_weight
from bitsearch.quantizers.codec import Encoded
from bitsearch.quantizers.external import read_back
from bitsearch.quantizers.second_moment import SecondMoment
from bitsearch.units import Matrix, Unit

Quantizer = Callable[..., Encoded]
log = logging.getLogger(__name__)


class Moments(Protocol):
    """Second moments of inputs, such as `statistics_file.StoredMoments`."""

    def get(self, matrix: str) -> SecondMoment | None:
        """Of the inputs of a matrix, by its name; None if they were not seen."""


class CandidateWeights:
    """Quantizes matrices of a model on demand and puts them in place.

    Codes are kept, least recently used first out, up to `cache_bytes`, so that
    a candidate is quantized once and not for each policy that contains it.

    Args:
        model: the model; outside of `applied` it holds its reference weights. What only
            quantizes, and applies nothing, may read them from a checkpoint instead.
        quantizer: (weight, format, importance) -> Encoded.
        importance: mean square of each input column, (in,), by matrix name.
        cache_bytes: most bytes of codes to keep.
        moments: second moments of the inputs by matrix name, for a quantizer that
            takes `moment`; matrices without one are told of once.
        external: where the weights of formats come from, if another tool made them.
    """

    def __init__(
        self,
        model: Parameters,
        quantizer: Quantizer,
        importance: Mapping[str, Tensor],
        cache_bytes: int,
        moments: Moments | None = None,
        external: Mapping[Format, Parameters] | None = None,
    ) -> None:
        self.model = model
        self._quantizer = quantizer
        self._importance = importance
        self._moments = moments
        self._external = external or {}
        self._told = False
        self._cache: OrderedDict[tuple[str, Format], tuple[Encoded, ...]] = OrderedDict()
        self._room = cache_bytes

    def reference(self, matrix: Matrix) -> Tensor:
        """(count·out, in) float32 copy of the weights in place now."""
        return read_weight(self.model, matrix)

    def candidate(self, matrix: Matrix, format: Format) -> Tensor:
        """(count·out, in) float32 values of a matrix in a format.

        The model must hold its reference weights, or `applied` must have
        quantized the matrix before.
        """
        if format.exact:
            dtype = torch.bfloat16 if format.kind == "bf16" else torch.float16
            return self.reference(matrix).to(dtype).float()
        parts = self.quantized(matrix, format)
        return (
            parts[0].dequantize() if len(parts) == 1 else torch.cat([p.dequantize() for p in parts])
        )

    def quantized(self, matrix: Matrix, format: Format) -> tuple[Encoded, ...]:
        """Each matrix of a stack in a format that is not exact."""
        key = (matrix.name, format)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        found = (
            self._read_back(matrix, format)
            if format in self._external
            else self._rounded(matrix, format)
        )
        self._cache[key] = found
        self._room -= _bytes(found)
        while self._room < 0 and len(self._cache) > 1:
            self._room += _bytes(self._cache.popitem(last=False)[1])
        return found

    def together(self, matrices: Sequence[Matrix], format: Format) -> Encoded:
        """Matrices of the same inputs, quantized as one whose rows are theirs in turn.

        Args:
            matrices: (out_i, in), not stacks; the statistics of the first hold for all.
            format: not exact.

        Raises:
            BadInput: another tool quantized them, one by one.
        """
        if format in self._external:
            raise BadInput(
                f"weights in {format.name} come from another tool, whose codes are not known"
            )
        whole = torch.cat([self.reference(matrix) for matrix in matrices])
        return self._encoded([whole], matrices[0], format)[0]

    def _read_back(self, matrix: Matrix, format: Format) -> tuple[Encoded, ...]:
        values = read_weight(self._external[format], matrix)
        if values.shape != (matrix.count * matrix.out_features, matrix.in_features):
            raise BadInput(f"{matrix.name} has another shape in the weights for {format.name}")
        return tuple(read_back(part, format, matrix.name) for part in values.chunk(matrix.count))

    def _rounded(self, matrix: Matrix, format: Format) -> tuple[Encoded, ...]:
        # One by one: a format may have a scale for a whole matrix.
        return self._encoded(self.reference(matrix).chunk(matrix.count), matrix, format)

    def _encoded(
        self, weights: Sequence[Tensor], matrix: Matrix, format: Format
    ) -> tuple[Encoded, ...]:
        """(out, in) weights, each quantized with the statistics of a matrix."""
        if not all(all_finite(weight) for weight in weights):
            raise BadInput(f"{matrix.name} holds NaN or infinite weights; repair the checkpoint")
        given: list[Any] = [self._importance.get(matrix.name)]
        if self._moments is not None:
            given.append(self._moment(matrix, self._moments))
        return tuple(self._quantizer(weight, format, *given) for weight in weights)

    def _moment(self, matrix: Matrix, moments: Moments) -> SecondMoment | None:
        moment = moments.get(matrix.name)
        if moment is None and not self._told:
            self._told = True
            log.warning(
                "the inputs of %s are not seen: it is rounded to nearest, as are others like it",
                matrix.name,
            )
        return moment

    @contextmanager
    def applied(self, choice: Sequence[tuple[Unit, Format]]) -> Iterator[None]:
        """Hold the given units in the given formats, then restore the reference."""
        originals: list[tuple[Tensor, Tensor]] = []
        try:
            for unit, format in choice:
                for matrix in unit.matrices:
                    value = self.candidate(matrix, format)
                    originals.append(_saved(self.model, matrix))
                    write_weight(self.model, matrix, value)
            yield
        finally:
            _restore(originals)

    @contextmanager
    def swapping(self, units: Sequence[Unit]) -> Iterator[Callable[[Unit, Format], None]]:
        """Put one unit after another into formats, then restore the reference.

        Yields a function that puts one of these units into a format and leaves
        the others as they are.
        """
        originals = {m.name: _saved(self.model, m) for unit in units for m in unit.matrices}

        def swap(unit: Unit, format: Format) -> None:
            for matrix in unit.matrices:
                # a candidate that is not kept is quantized anew, from the reference
                _restore([originals[matrix.name]])
                write_weight(self.model, matrix, self.candidate(matrix, format))

        try:
            yield swap
        finally:
            _restore(list(originals.values()))

    @contextmanager
    def preserved(self, unit: Unit) -> Iterator[None]:
        """Let the body overwrite a unit's weights, then restore them."""
        originals = [_saved(self.model, matrix) for matrix in unit.matrices]
        try:
            yield
        finally:
            _restore(originals)


def _saved(model: Parameters, matrix: Matrix) -> tuple[Tensor, Tensor]:
    parameter = model.get_parameter(matrix.name)
    return parameter, parameter.detach().clone()


@torch.no_grad()
def _restore(originals: Sequence[tuple[Tensor, Tensor]]) -> None:
    # Backwards, so that a parameter written twice gets its first value back.
    for parameter, original in reversed(originals):
        parameter.copy_(original)


def _bytes(parts: Sequence[Encoded]) -> int:
    return sum(part.nbytes for part in parts)
