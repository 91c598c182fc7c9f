"""Dominance, hypervolume and knee against their definitions."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitsearch.errors import UsageError
from bitsearch.solvers.front import hypervolume, knee, non_dominated


def grid_points(objectives, most, side):
    """Few points on a small grid, so that equal coordinates are common."""
    shape = st.tuples(st.integers(0, most), st.just(objectives))
    return hnp.arrays(np.float64, shape, elements=st.integers(0, side))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4).flatmap(lambda k: grid_points(k, 12, 5)))
def test_non_dominated_is_the_definition(points):
    expected = [
        not any((other <= point).all() and (other < point).any() for other in points)
        for point in points
    ]
    assert non_dominated(points).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 3).flatmap(lambda k: grid_points(k, 8, 6)))
def test_hypervolume_counts_dominated_cells(points):
    side = 5
    reference = np.full(points.shape[1], float(side))
    cells = sum(
        any((point <= cell).all() for point in points)
        for cell in product(range(side), repeat=points.shape[1])
    )
    assert hypervolume(points, reference) == cells


def test_hypervolume_of_known_shapes():
    assert hypervolume(np.array([[0.25, 0.5]]), np.ones(2)) == 0.375
    assert hypervolume(np.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.9]]), np.ones(3)) == pytest.approx(
        0.125 + 0.1 - 0.25 * 0.1
    )
    with pytest.raises(UsageError, match="2 or 3"):
        hypervolume(np.ones((1, 4)), np.ones(4))


def test_knee_is_the_corner():
    corner = np.array([[0.0, 1.0], [0.1, 0.5], [0.2, 0.1], [0.6, 0.05], [1.0, 0.0]])
    assert knee(corner) == 2
    scaled = corner * [1e9, 1e-3] + [5e9, 7.0]
    assert knee(scaled) == 2
    assert knee(np.vstack([[[0.9, 0.9]], corner])) == 3  # a dominated point moves nothing


def test_knee_of_a_hyperbola_is_its_vertex():
    bytes_ = np.geomspace(0.1, 10, 101)
    assert knee(np.column_stack([bytes_, 1 / bytes_])) == 50


def test_knee_of_few_points():
    assert knee(np.array([[3.0, 4.0]])) == 0
    assert knee(np.array([[0.0, 1.0], [1.0, 0.0]])) in (0, 1)
    with pytest.raises(UsageError, match="two objectives"):
        knee(np.zeros((0, 2)))
