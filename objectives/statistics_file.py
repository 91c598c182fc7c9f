"""Input statistics on disk: mean squares, and second moments read one at a time.

A safetensors file: the mean squares under the names of the matrices; second moments
as `UNIT:second_moment`, with the unit of each matrix in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.models.writing import content, header
from bitsearch.quantizers.second_moment import SecondMoment
from bitsearch.units import Unit

_UNITS = "second_moments"  # in the metadata: JSON, unit by matrix


def statistics_parts(
    corpus: str,
    means: Mapping[str, Tensor],
    units: Iterable[Unit] = (),
    moments: Iterable[Tensor] = (),
) -> Iterator[bytes]:
    """The bytes of a statistics file, piece by piece.

    Args:
        corpus: hash of the text that they are of.
        means: (in,) mean squares by matrix name.
        units: whose second moments follow.
        moments: (in, in), one of each of these units.
    """
    units = list(units)
    shapes = {name: tuple(means[name].shape) for name in sorted(means)}
    for unit in units:
        shapes[_entry(unit.name)] = (unit.matrices[0].in_features,) * 2
    of = {matrix.name: unit.name for unit in units for matrix in unit.matrices}
    metadata = {"corpus": corpus, **({_UNITS: json.dumps(of)} if of else {})}
    yield header(((name, torch.float32, shape) for name, shape in shapes.items()), metadata)
    for name in sorted(means):
        yield content(means[name].float())
    for moment in moments:
        yield content(moment.float())


def _entry(unit: str) -> str:
    return f"{unit}:second_moment"


def read_mean_squares(path: Path, device: Any) -> dict[str, Tensor]:
    """(in,) mean squares by matrix name.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: file.get_tensor(name).to(device)
                for name in file.keys()  # noqa: SIM118 - not a mapping
                if len(file.get_slice(name).get_shape()) == 1
            }
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error


class StoredMoments:
    """The second moments of a statistics file; the last one read is kept.

    Args:
        path: the file.
        device: where they are wanted.

    Raises:
        BadInput: the file is damaged, or holds none.
    """

    def __init__(self, path: Path, device: Any) -> None:
        self._path, self._device = path, device
        try:
            with safe_open(path, framework="pt") as file:
                self._units: dict[str, str] = json.loads((file.metadata() or {})[_UNITS])
        except (OSError, SafetensorError, ValueError) as error:
            raise BadInput(f"{path} is damaged: {error}") from error
        except KeyError as error:
            raise BadInput(
                f"{path} holds no second moments of inputs, which the quantizer needs"
            ) from error
        self._last: tuple[str, SecondMoment] | None = None

    def get(self, matrix: str) -> SecondMoment | None:
        """Of the inputs of a matrix, by its name; None if they were not seen."""
        unit = self._units.get(matrix)
        if unit is None:
            return None
        if self._last is None or self._last[0] != unit:
            self._last = None
            try:
                with safe_open(self._path, framework="pt") as file:
                    moment = SecondMoment(file.get_tensor(_entry(unit)).to(self._device))
            except (OSError, SafetensorError) as error:
                raise BadInput(f"{self._path} is damaged: {error}") from error
            self._last = unit, moment
        return self._last[1]
