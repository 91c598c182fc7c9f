"""The contract of every solver: arrays in, one choice per unit out.

    minimise    Σ_u damage[u, choice[u]]  (+ Σ_u<v pairs[u, choice[u], v, choice[v]])
    subject to  Σ_u costs[r, u, choice[u]] ≤ budgets[r]      for each resource r
                choice[u] = choice[v]                        for u, v in one tie
                |{choice[u]}| ≤ distinct                     if that is given

A candidate that a unit may not take has damage +inf. A candidate index means
the same format for every unit, so that ties and `distinct` make sense. A solver
that cannot honour `distinct` or `pairs` refuses them with a UsageError.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitsearch.errors import BadInput, InfeasibleBudget, UsageError

Damage = NDArray[np.float64] | NDArray[np.float32]
Costs = NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float64]
Choice = NDArray[np.int64]
Pairs = NDArray[np.float64] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Problem:
    """A multiple-choice knapsack.

    Attributes:
        damage: (units, candidates), +inf where a candidate is not allowed.
        costs: (resources, units, candidates); integers where they count bytes.
        budgets: (resources,) upper limits, never exceeded; +inf is no limit.
        ties: disjoint sets of unit indices that must take the same candidate.
        distinct: most different candidates in the whole policy; None is no limit.
        pairs: (units, candidates, units, candidates), symmetric: damage that two
            units' candidates add together, beyond what each does alone. The
            blocks of a unit with itself do not count (a solver may use them to
            see that the whole is convex). None is additive.

    Raises:
        UsageError: the arrays do not fit each other, a tie is malformed, or
            `distinct` is below 1.
        BadInput: a damage is NaN or -inf, a cost is negative or not finite, or a
            pair term is not finite.
    """

    damage: Damage
    costs: Costs
    budgets: NDArray[np.float64] | NDArray[np.int64]
    ties: tuple[tuple[int, ...], ...] = ()
    distinct: int | None = None
    pairs: Pairs | None = None

    def __post_init__(self) -> None:
        if self.damage.ndim != 2 or self.damage.size == 0:
            raise UsageError(
                f"damage has shape {self.damage.shape}; give (units, candidates), one at least"
            )
        wanted = (len(self.budgets), *self.damage.shape)
        if self.costs.shape != wanted:
            raise UsageError(
                f"costs have shape {self.costs.shape}, not {wanted}: "
                "(resources, units, candidates) with one budget per resource"
            )
        # min and max propagate NaN and need no temporary array
        if not self.damage.min() > -np.inf:
            unit, candidate = np.argwhere(~(self.damage > -np.inf))[0]
            raise BadInput(
                f"damage of unit {unit}, candidate {candidate} is {self.damage[unit, candidate]}; "
                "measure it again, or write inf to forbid the candidate"
            )
        if self.costs.size and not (self.costs.min() >= 0 and self.costs.max() < np.inf):
            bad = ~((self.costs >= 0) & (self.costs < np.inf))
            resource, unit, candidate = np.argwhere(bad)[0]
            raise BadInput(
                f"cost of unit {unit}, candidate {candidate} in resource {resource} is "
                f"{self.costs[resource, unit, candidate]}; costs are finite and not negative "
                "(forbid a candidate by damage inf)"
            )
        if np.isnan(self.budgets).any():
            raise UsageError("a budget is NaN; give a number")
        tied = list(chain.from_iterable(self.ties))
        if len(set(tied)) != len(tied) or any(not 0 <= u < len(self.damage) for u in tied):
            raise UsageError(f"ties must be disjoint sets of unit indices below {len(self.damage)}")
        if self.distinct is not None and self.distinct < 1:
            raise UsageError(
                f"at most {self.distinct} distinct candidates is no policy; give 1 or more"
            )
        if self.pairs is not None:
            if self.pairs.shape != self.damage.shape * 2:
                raise UsageError(
                    f"pairs have shape {self.pairs.shape}, not {self.damage.shape * 2}: "
                    "(units, candidates, units, candidates)"
                )
            if not np.isfinite(self.pairs).all():
                raise BadInput("a pair term is not finite; forbid candidates by damage inf")
            cells = self.pairs.reshape(self.damage.size, self.damage.size)
            if not np.allclose(cells, cells.T, rtol=1e-6, atol=1e-6 * np.abs(cells).max()):
                raise UsageError("pairs must be symmetric: pairs[u, c, v, d] = pairs[v, d, u, c]")

    def total_damage(self, choice: Choice) -> float:
        """Σ damage of a choice of shape (units,), pair terms included."""
        rows = np.arange(len(choice))
        total = float(self.damage[rows, choice].sum(dtype=np.float64))
        if self.pairs is None:
            return total
        taken = self.pairs[rows[:, None], choice[:, None], rows, choice].astype(np.float64)
        return total + float(np.triu(taken, 1).sum())

    def total_costs(self, choice: Choice) -> NDArray[np.int64] | NDArray[np.float64]:
        """Costs of a choice, shape (resources,); exact where costs are integers."""
        dtype = np.int64 if np.issubdtype(self.costs.dtype, np.integer) else np.float64
        totals: NDArray[np.int64] | NDArray[np.float64]
        totals = self.costs[:, np.arange(len(choice)), choice].sum(axis=1, dtype=dtype)
        return totals

    def feasible(self, choice: Choice) -> bool:
        """Whether a choice keeps every budget and rule and takes only allowed candidates."""
        allowed = np.isfinite(self.damage[np.arange(len(choice)), choice]).all()
        within = (self.total_costs(choice) <= self.budgets).all()
        tied = all(len({int(choice[unit]) for unit in tie}) <= 1 for tie in self.ties)
        few = self.distinct is None or len(np.unique(choice)) <= self.distinct
        return bool(allowed and within and tied and few)


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, and what is known about how good it can be.

    Attributes:
        choice: (units,) candidate index of each unit.
        damage: Σ damage of the choice.
        bound: certified lower bound on the damage of every feasible choice,
            None if the solver certifies nothing.
    """

    choice: Choice
    damage: float
    bound: float | None

    @property
    def gap(self) -> float | None:
        """Relative gap (damage − bound) / |damage|; None without a bound, 0 if exact."""
        if self.bound is None:
            return None
        excess = max(0.0, self.damage - self.bound)
        return 0.0 if excess == 0.0 else excess / max(abs(self.damage), 1e-300)


class Solver(Protocol):
    """Solves a problem; deterministic for a given seed.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: the solver cannot handle such a problem.
    """

    def __call__(self, problem: Problem, *, seed: int = 0) -> Solution: ...


__all__ = [
    "Choice",
    "Costs",
    "Damage",
    "InfeasibleBudget",
    "Pairs",
    "Problem",
    "Solution",
    "Solver",
]
