"""Random matrices in device form, on the GPU."""

from __future__ import annotations

from functools import partial

from bitsearch.kernels import random_planes
from bitsearch.kernels.fused import Fused

random_fused = partial(random_planes.random_fused, device="cuda")
random_input = partial(random_planes.random_input, device="cuda")


def copies(weight: Fused, count: int) -> list[Fused]:
    """The same matrix at other addresses."""
    return [weight, *(Fused(weight.shapes, weight.data.clone()) for _ in range(count - 1))]
