"""Tied units as one unit: damages, costs and pair terms of the members add up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import InfeasibleBudget
from bitsearch.solvers.problem import Pairs, Problem


def merge_ties(problem: Problem) -> tuple[Problem, NDArray[np.int64]]:
    """The same problem with every tie merged into its first unit.

    A candidate is allowed for a tie if every member allows it.

    Raises:
        InfeasibleBudget: a unit or tie has no allowed candidate.

    Returns:
        The merged problem without ties, and `member` of shape (units,): a
        choice of the merged problem expands to `choice[member]`.
    """
    member = np.arange(len(problem.damage))
    merged = problem
    if any(len(tie) > 1 for tie in problem.ties):
        for tie in problem.ties:
            member[list(tie)] = min(tie, default=0)
        member = np.unique(member, return_inverse=True)[1]
        # members of one merged unit side by side, the first of each at `starts`
        order = np.argsort(member, kind="stable")
        starts = np.flatnonzero(np.diff(member[order], prepend=-1))
        dtype = np.float64 if problem.costs.dtype == np.float64 else np.int64
        damage = np.add.reduceat(problem.damage[order].astype(np.float64), starts, axis=0)
        pairs = problem.pairs
        if pairs is not None:
            pairs, inside = _merged_pairs(pairs, order, starts)
            damage += inside
        merged = Problem(
            damage,
            np.add.reduceat(problem.costs[:, order].astype(dtype), starts, axis=1),
            problem.budgets,
            distinct=problem.distinct,
            pairs=pairs,
        )
    possible = merged.damage.min(axis=1) < np.inf
    if not possible.all():
        stuck = np.flatnonzero(member == possible.argmin())
        raise InfeasibleBudget(
            f"no candidate is allowed for {'tied units' if len(stuck) > 1 else 'unit'} "
            f"{', '.join(map(str, stuck))}; allow one"
        )
    return merged, member


def _merged_pairs(
    pairs: Pairs, order: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[Pairs, NDArray[np.float64]]:
    """Pair terms between merged units, and (units, candidates) what each holds inside."""
    sorted_pairs = pairs[order][:, :, order].astype(np.float64)
    summed = np.add.reduceat(np.add.reduceat(sorted_pairs, starts, axis=0), starts, axis=2)
    # a unit with itself does not count
    alone = np.add.reduceat(np.einsum("ucuc->uc", sorted_pairs), starts, axis=0)
    inside = (np.einsum("ucuc->uc", summed) - alone) / 2
    return summed, inside
