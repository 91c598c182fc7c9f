"""Read and write one matrix of a model, whatever way the model stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from bitsearch.units import Matrix

if TYPE_CHECKING:
    from torch import Tensor


class Parameters(Protocol):
    """Where weights are: a model, or a checkpoint on disk."""

    def get_parameter(self, target: str) -> Tensor:
        """The parameter of a name.

        Raises:
            AttributeError: there is none.
        """


def read_weight(model: Parameters, matrix: Matrix) -> Tensor:
    """A float32 copy of a matrix, shape (count · out_features, in_features).

    Rows of stacked experts follow one another; each row is one output.
    """
    import torch

    stored = model.get_parameter(matrix.name).detach()
    rows = stored.mT if matrix.transposed else stored
    copy = torch.empty(rows.shape, dtype=torch.float32, device=rows.device).copy_(rows)
    return copy.reshape(-1, matrix.in_features)


def all_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite; takes no memory, as `isfinite` does."""
    import torch

    return all(bool(end.isfinite()) for end in torch.aminmax(values)) if values.numel() else True


def write_weight(model: Parameters, matrix: Matrix, value: Tensor) -> None:
    """Overwrite a matrix in place, so that tied parameters stay tied.

    Args:
        model: the model that holds the parameter.
        matrix: which parameter, and how it is stored.
        value: (count · out_features, in_features), any float dtype and device;
            rounded to the dtype of the parameter.

    Raises:
        ValueError: `value` has another shape.
    """
    import torch

    expected = (matrix.count * matrix.out_features, matrix.in_features)
    if tuple(value.shape) != expected:
        raise ValueError(f"{matrix.name} takes {expected}, not {tuple(value.shape)}")
    stored = model.get_parameter(matrix.name)
    rows = stored.mT if matrix.transposed else stored
    with torch.no_grad():
        rows.copy_(value.reshape(rows.shape))
