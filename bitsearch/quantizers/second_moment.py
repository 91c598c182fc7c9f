"""The second moment of a matrix's inputs, and the factor by which errors are fed back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """G = (1/T) Σ_t x_t x_tᵀ of the inputs x of a matrix.

    Attributes:
        matrix: (in, in), symmetric and positive semidefinite.
    """

    matrix: Tensor

    @cached_property
    def feedback(self) -> tuple[Tensor, Tensor]:
        """Columns in the order of rounding, and the factor for columns in that order.

        The order is that of the diagonal of G, largest first. Computed once.

        Returns:
            (in,) int64 columns and (in, in) float32 U.
        """
        order = self.matrix.diagonal().argsort(descending=True, stable=True)
        return order, self.factor(order)

    def factor(self, order: Tensor) -> Tensor:
        """(in, in) float32 U, upper triangular, UᵀU = (G + λI)⁻¹ of columns in an order.

        λ is 1 % of the mean of the diagonal (Frantar et al., "GPTQ", ICLR 2023, section
        3.3, steps 2 and 3).
        """
        damped = self.matrix[order][:, order].double()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        # G = RRᵀ with R upper triangular is a Cholesky factor read backwards; then U = R⁻¹.
        upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        found: Tensor = torch.linalg.solve_triangular(upper, unit, upper=True).float()
        return found
