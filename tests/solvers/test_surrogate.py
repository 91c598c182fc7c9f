"""The surrogate loop: measured points where the front has gaps."""

import numpy as np

from bitsearch.solvers import surrogate
from bitsearch.solvers.measured import coarse_units
from bitsearch.testing import model_like_problem
from bitsearch.testing_measured import SyntheticLoss


def problem_of(bits=4.0):
    """Two blocks with room between the least bytes and the budget."""
    return model_like_problem(
        np.random.default_rng(3), blocks=2, hidden=64, intermediate=160, kv=32, bits=bits
    )


def front_of(passes):
    """Bytes and log KL of a measured front, and the loss that measured it."""
    problem = problem_of()
    loss = SyntheticLoss(problem)
    found = surrogate.front(problem, loss, tokens=passes * 80, seed=1)
    for choice, kl in found:
        assert problem.feasible(choice)
        assert np.isclose(loss.exact(choice).mean(), kl)
    return np.array([(problem.total_costs(choice)[0], np.log(kl)) for choice, kl in found]), loss


def widest(points, scale):
    """The widest step of a front, as a share of its extent."""
    return (np.abs(np.diff(points, axis=0)) / scale).sum(axis=1).max()


def test_points_fall_and_gaps_close():
    few, _ = front_of(5)
    many, loss = front_of(40)
    for points in (few, many):
        assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) < 0).all()
    scale = np.ptp(few, axis=0)
    assert widest(many, scale) < 0.5 * widest(few, scale)
    assert loss.spent <= 41 * 80


def test_the_surrogate_prefers_what_was_measured_to_be_better():
    """Of two policies that the table holds for equal, the one like a better policy."""
    from bitsearch.solvers.ladders import make_ladders
    from bitsearch.solvers.problem import Problem

    damage = np.tile([4.0, 2.0, 1.0], (4, 1))
    problem = Problem(damage, np.tile([1, 2, 3], (1, 4, 1)), np.array([9]))
    ladders = make_ladders(problem, "test")
    group = np.arange(4)
    one, other = np.array([2, 0, 1, 1]), np.array([0, 2, 1, 1])
    measured = [(np.array([2, 0, 0, 0]), 1.0), (np.array([0, 2, 0, 0]), 10.0)]
    first, second = surrogate._predicted(ladders, group, measured, [one, other])
    assert first < second


def test_coarse_units_are_kinds_in_thirds_of_depth():
    from bitsearch.solvers.measured import Traits

    traits = Traits(np.array([0, 1, 0, 1, 0, 1]), np.array([0.0, 0.1, 0.4, 0.5, 0.9, 1.0]))
    found = coarse_units(np.arange(6), traits)
    assert len(set(found.tolist())) == 6
    tied = coarse_units(np.array([0, 1, 0, 1, 2, 3]), traits)
    assert tied.shape == (4,) and len(set(tied.tolist())) == 4
    same = coarse_units(np.arange(3), Traits(np.zeros(3, np.int64), np.array([0.0, 0.2, 0.9])))
    assert same[0] == same[1] != same[2]
