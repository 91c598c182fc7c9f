"""Random weights and inputs that kernels are timed and checked on."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitsearch.formats import parse_format
from bitsearch.kernels.devices import Launch

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.kernels.devices import Parts
    from bitsearch.quantizers.codec import Encoded

_TILE = 256  # rows drawn; larger matrices repeat them, which no kernel notices


def tile(n: int, k: int, seed: int) -> NDArray[np.float32]:
    """(rows, k) weights, of which an (n, k) matrix repeats the rows in turn."""
    rng = np.random.default_rng([seed, n, k])
    return 0.02 * rng.standard_normal((min(n, _TILE), k), np.float32)


def inputs(m: int, k: int, seed: int) -> NDArray[np.float32]:
    """(m, k) inputs."""
    return np.random.default_rng([seed, m, k, 1]).standard_normal((m, k), np.float32)


def relative_error(
    found: NDArray[np.float32], x: NDArray[np.float32], weights: NDArray[np.float32]
) -> float:
    """Largest |y − y₆₄| / max |y₆₄|, with y₆₄ = x Wᵀ in float64.

    Args:
        found: (m, n) results of a kernel.
        x: (m, k) inputs.
        weights: (rows, k) values that the kernel's weights stand for; n rows repeat them.
    """
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    exact = np.resize(exact.T, found.T.shape).T
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def random_parts(launch: Launch, seed: int) -> tuple[Parts, NDArray[np.float32]]:
    """Matrices that hold a launch's rows at least, and values that these repeat.

    Args:
        launch: of one format.
        seed: of the weights.
    """
    part, values = _encoded(launch.segments[0][1], launch.n, launch.k, seed)
    return [part] * -(-launch.n // len(values)), values


@lru_cache(maxsize=256)
def _encoded(name: str, n: int, k: int, seed: int) -> tuple[Encoded | Tensor, NDArray[np.float32]]:
    """A tile of random weights in a format, and its values."""
    import torch

    from bitsearch.quantizers.rtn import quantize

    format = parse_format(name)
    rows = torch.from_numpy(tile(n, k, seed))
    if format.exact:
        dtype = torch.bfloat16 if format.kind == "bf16" else torch.float16
        return rows, rows.to(dtype).float().numpy()
    encoded = quantize(rows, format)
    return encoded, encoded.dequantize().numpy()
