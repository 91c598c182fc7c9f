"""Sets of points that no other beats: dominance, hypervolume, knee.

All objectives are minimised. A point dominates another if it is no worse in
every objective and better in one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import UsageError

Points = NDArray[np.float64]


def non_dominated(points: Points) -> NDArray[np.bool_]:
    """Which points no other dominates; equal points do not dominate each other.

    Args:
        points: (points, objectives).

    Returns:
        (points,) mask.
    """
    # a point can only be dominated by one before it in this order
    order = np.lexsort(points.T[::-1])
    rest = points[order]
    mask = np.zeros(len(points), np.bool_)
    while len(order):
        mask[order[0]] = True
        first = rest[0]
        beaten = (rest >= first).all(axis=1) & (rest > first).any(axis=1)
        beaten[0] = True
        order, rest = order[~beaten], rest[~beaten]
    return mask


def hypervolume(points: Points, reference: Points) -> float:
    """Volume dominated by the points up to a reference point, for 2 or 3 objectives.

    Zitzler and Thiele, IEEE Trans. Evolutionary Computation 3, 1999. In two
    dimensions a sum of rectangles; in three a sum of slabs along the third.

    Args:
        points: (points, objectives); those not below the reference count nothing.
        reference: (objectives,) the worst corner.

    Raises:
        UsageError: there are not 2 or 3 objectives.
    """
    objectives = points.shape[1]
    if objectives not in (2, 3) or reference.shape != (objectives,):
        raise UsageError(
            f"hypervolume takes 2 or 3 objectives and as many reference values, not "
            f"{objectives} and {len(reference)}"
        )
    inside = points[(points < reference).all(axis=1)]
    if objectives == 2:
        return _area(inside, reference)
    inside = inside[inside[:, 2].argsort(kind="stable")]
    heights = np.diff(np.append(inside[:, 2], reference[2]))
    slabs = (
        height * _area(inside[: count + 1, :2], reference[:2])
        for count, height in enumerate(heights)
        if height > 0
    )
    return float(sum(slabs))


def _area(points: Points, reference: Points) -> float:
    """Area between the staircase of points below the reference and the reference."""
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    steps = np.minimum.accumulate(np.append(reference[1], points[:, 1]))
    return float(((reference[0] - points[:, 0]) * -np.diff(steps)).sum())


def knee(points: Points) -> int:
    """Index of the point that bulges most below the line between a front's ends.

    Both objectives are scaled to [0, 1] between the ends first (Das, "On
    characterizing the knee of the Pareto curve", Structural Optimization 18,
    1999). Pass logarithms where ratios matter.

    Args:
        points: (points, 2), at least one.

    Raises:
        UsageError: there are no points, or not two objectives.
    """
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise UsageError(f"a knee needs points of two objectives, not shape {points.shape}")
    front = np.flatnonzero(non_dominated(points))
    low, high = points[front].min(axis=0), points[front].max(axis=0)
    scaled = (points[front] - low) / np.where(high > low, high - low, 1.0)
    return int(front[scaled.sum(axis=1).argmin()])
