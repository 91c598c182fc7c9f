"""Damages that never rise with cost: more bytes cannot hurt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def monotone(
    damage: NDArray[np.float64], costs: NDArray[np.int64] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Running minimum of each unit's damage over increasing cost.

    A larger candidate that measures worse than a smaller one shows noise of
    the measurement, not a property of the format. Candidates of equal cost
    are left as they are to each other; a forbidden one (+inf) stays forbidden.

    Args:
        damage: (units, candidates), +inf where a candidate is not allowed.
        costs: (units, candidates).
    """
    # among equal costs the worst first, so that none of them lowers another
    order = np.lexsort((-damage, costs), axis=1)
    falling = np.minimum.accumulate(np.take_along_axis(damage, order, axis=1), axis=1)
    result = np.empty_like(damage)
    np.put_along_axis(result, order, falling, axis=1)
    return np.where(np.isinf(damage), damage, result)
