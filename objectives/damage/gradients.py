"""Gradients of the language-model loss with respect to the units' weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsearch.models.decoder import Decoder
from bitsearch.units import Matrix


@contextmanager
def differentiable(decoder: Decoder, matrices: Sequence[Matrix]) -> Iterator[list[Tensor]]:
    """Let the parameters of some matrices, and no others, require gradients."""
    parameters = [decoder.model.get_parameter(matrix.name) for matrix in matrices]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def next_token_loss(decoder: Decoder, window: Tensor) -> Tensor:
    """Mean negative log likelihood of the tokens of a (length,) window."""
    logits = decoder.logits(decoder.hidden(window[None]))[0, :-1]
    return F.cross_entropy(logits, window[1:])


def sampled_token_loss(decoder: Decoder, window: Tensor, generator: torch.Generator) -> Tensor:
    """Σ over positions of −log p(y), y drawn from the model's own prediction.

    Its gradient is a score, so that E[g gᵀ] is the true Fisher information of
    the window, the curvature of KL(reference ‖ model) at the reference.
    """
    logits = decoder.logits(decoder.hidden(window[None]))[0]
    return F.cross_entropy(logits, sample(logits, generator), reduction="sum")


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(rows,) tokens drawn from (rows, vocabulary) logits, on the CPU's randomness."""
    uniform = torch.rand((len(logits), 1), generator=generator, dtype=torch.float64)
    cumulative = logits.detach().double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.to(logits.device) * cumulative[:, -1:])
    return drawn[:, 0].clamp_(max=logits.shape[-1] - 1)


def oriented(matrix: Matrix, stored: Tensor) -> Tensor:
    """A gradient as stored -> (count·out, in), like the weights it belongs to."""
    return (stored.mT if matrix.transposed else stored).reshape(-1, matrix.in_features)
