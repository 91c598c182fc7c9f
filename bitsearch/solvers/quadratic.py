"""Damage with pair terms: a convex lower bound, local search, and proof if small.

    minimise  f(z) = dᵀz + ½ zᵀQz,   z the 0-1 vector of chosen cells

with Q the pair terms. At such z, z_i² = z_i: adding any W to the diagonal of Q
and taking ½ diag(Q + W) off d changes nothing, and makes f convex where W is
large enough (Hammer and Rubin, RAIRO 4, 1970). Then

1. Frank and Wolfe's method with pairwise steps (Lacoste-Julien and Jaggi,
   NeurIPS 2015) minimises f over mixtures of feasible policies. Its subproblem
   is the additive one with the gradient for damage, which an exact solver
   answers: g(s − z) + f(z) is a lower bound on every policy, tighter than with
   mixtures of candidates, and every s is a policy that keeps all budgets.
2. The best of these policies are improved by changes of one unit and of two,
   whose effect follows from Qz, updated with each change.

Where there are few products the integer program of `linearised.py` answers
instead, and without pair terms the exact additive solver.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from bitsearch.errors import UsageError
from bitsearch.solvers import milp, pareto_dp
from bitsearch.solvers.budget import refuse, require_feasible
from bitsearch.solvers.linearised import products, solve_linearised
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.ties import merge_ties

MAX_CELLS = 12_000  # Q is dense: 1.2 GB
MAX_STEPS = 200
STARTS = 8
NEIGHBOURS = 1024  # cells that changes of two units are drawn from
LINEARISED = 1000  # products up to which the integer program takes seconds
_TOLERANCE = 1e-6

Floats = NDArray[np.float64]


def solve(problem: Problem, *, seed: int = 0, time_limit: float = 30.0) -> Solution:
    """The best policy found, and the convex bound, or the optimum of a small problem.

    Args:
        problem: with or without pair terms.
        seed: of the units that two are changed of together, where there are many.
        time_limit: seconds for the integer program of a small problem.

    Raises:
        InfeasibleBudget: no choice fits.
        UsageError: a limit on distinct candidates, or too many pair terms.
        OutOfResources: the integer program found nothing within the time limit.
    """
    refuse(problem, "quadratic", "distinct")
    if problem.pairs is None:
        return _additive(problem, seed)
    merged, member = merge_ties(problem)
    require_feasible(merged)
    if products(merged) <= LINEARISED:
        choice, bound = solve_linearised(merged, 1e-9, time_limit)
    else:
        choice, bound = _searched(_formed(merged), seed)
    total = problem.total_damage(choice[member])
    return Solution(choice[member], total, min(bound, total))


def _searched(form: _Form, seed: int) -> tuple[Choice, float]:
    """The best of the policies that relaxations pass, improved, and the best bound."""
    relaxed = [_relaxed(form, convex, seed) for convex in form.convex]
    found = {policy.tobytes(): policy for policies, _ in relaxed for policy in policies}
    policies = sorted(found.values(), key=form.value)
    rng = np.random.default_rng(seed)
    improved = [_improved(form, policy, rng) for policy in policies[:STARTS]]
    return form.choice(min(improved, key=form.value)), max(bound for _, bound in relaxed)


def _additive(problem: Problem, seed: int) -> Solution:
    """The exact answer without pair terms, by whichever solver takes the problem."""
    try:
        return pareto_dp.solve(problem, seed=seed)
    except UsageError:  # several budgets, or fractions
        return milp.solve(problem, seed=seed)


@dataclass(frozen=True, slots=True)
class _Form:
    """A problem without ties as arrays over its allowed cells.

    Attributes:
        problem: what it was.
        unit, candidate: (cells,) of each cell.
        linear: (cells,) d.
        q: (cells, cells), 0 within a unit.
        convex: (cells, cells) matrices to take for q in relaxations, see _convexities.
    """

    problem: Problem
    unit: NDArray[np.int64]
    candidate: NDArray[np.int64]
    linear: Floats
    q: Floats
    convex: list[Floats]

    def value(self, cells: NDArray[np.int64]) -> float:
        """f of a policy given as its (units,) cells."""
        return float(self.linear[cells].sum() + self.q[np.ix_(cells, cells)].sum() / 2)

    def choice(self, cells: NDArray[np.int64]) -> Choice:
        """Candidate of each unit."""
        return self.candidate[cells]

    def cells(self, choice: Choice) -> NDArray[np.int64]:
        """Cell of each unit."""
        index = np.zeros(self.problem.damage.shape, np.int64)
        index[self.unit, self.candidate] = np.arange(len(self.unit))
        return index[np.arange(len(choice)), choice]

    def cheapest(self, gradient: Floats, seed: int) -> tuple[NDArray[np.int64], float]:
        """The feasible policy of least Σ gradient, and a lower bound on that sum."""
        damage = np.full(self.problem.damage.shape, np.inf)
        damage[self.unit, self.candidate] = gradient
        solution = _additive(replace(self.problem, damage=damage, pairs=None), seed)
        bound = -np.inf if solution.bound is None else solution.bound
        return self.cells(solution.choice), bound


def _formed(problem: Problem) -> _Form:
    assert problem.pairs is not None
    unit, candidate = np.nonzero(problem.damage < np.inf)
    if len(unit) > MAX_CELLS:
        raise UsageError(
            f"solver 'quadratic' takes up to {MAX_CELLS} candidates over all units, not "
            f"{len(unit)}; use solver 'pareto_dp', or fewer candidates"
        )
    flat = problem.pairs.reshape(problem.damage.size, problem.damage.size)
    at = unit * problem.damage.shape[1] + candidate
    whole = flat[np.ix_(at, at)].astype(np.float64)
    whole = (whole + whole.T) / 2
    linear = problem.damage[unit, candidate].astype(np.float64)
    between = np.where(unit[:, None] != unit, whole, 0.0)
    convex = _convexities(whole, between, linear)
    return _Form(problem, unit, candidate, linear, between, convex)


def _convexities(whole: Floats, between: Floats, damage: Floats) -> list[Floats]:
    """Positive semidefinite matrices with the same values at policies, none always best.

    One keeps the blocks within units, if there are any; one leaves them out.
    """
    norm = np.linalg.norm(between, axis=1)
    ways = [_made_convex(between, np.sqrt(np.abs(damage) * norm))]
    if np.any(whole != between):
        own = np.diag(whole).clip(min=0)
        ways.append(_made_convex(whole, np.where(own > 0, own, np.linalg.norm(whole, axis=1))))
    return ways


def _made_convex(q: Floats, weight: Floats) -> Floats:
    """q plus the least multiple of a diagonal that makes it positive semidefinite."""
    least = 1e-9 * float(weight.max()) or 1.0
    weight = np.maximum(weight, least)
    root = np.sqrt(weight)
    smallest = eigh(
        q / root[:, None] / root, eigvals_only=True, subset_by_index=[0, 0], overwrite_a=True
    )
    return q + np.diag((_TOLERANCE - float(smallest[0])) * weight)


def _relaxed(form: _Form, convex: Floats, seed: int) -> tuple[list[NDArray[np.int64]], float]:
    """Distinct feasible policies on the way to the best mixture, and the lower bound."""
    tilted = form.linear - np.diag(convex) / 2
    start, additive_bound = form.cheapest(form.linear, seed)
    policies, weights = [start], [1.0]
    images = [convex[:, start].sum(axis=1)]  # convex @ z of each policy
    known = {start.tobytes(): 0}
    # without the pair terms that can help, the additive bound holds too
    bound = additive_bound if (form.q >= 0).all() else -np.inf
    for _ in range(MAX_STEPS):
        image = np.sum([w * i for w, i in zip(weights, images, strict=True) if w > 0], axis=0)
        gradient = tilted + image
        at_policies = np.array([gradient[policy].sum() for policy in policies])
        slope = float(at_policies @ weights)
        value = slope - _mixed(image, policies, weights) / 2
        towards, least = form.cheapest(gradient, seed)
        bound = max(bound, value + least - slope)
        if value - bound <= _TOLERANCE * abs(value):
            break
        key = towards.tobytes()
        if key not in known:
            known[key] = len(policies)
            policies.append(towards)
            weights.append(0.0)
            images.append(convex[:, towards].sum(axis=1))
            at_policies = np.append(at_policies, gradient[towards].sum())
        enter = known[key]
        leave = max(np.flatnonzero(weights), key=lambda i: at_policies[i])
        change = images[enter] - images[leave]
        curvature = float(change[policies[enter]].sum() - change[policies[leave]].sum())
        descent = float(at_policies[leave] - at_policies[enter])
        if descent <= 0:
            break
        step = weights[leave] if curvature <= 0 else min(weights[leave], descent / curvature)
        weights[enter] += step
        weights[leave] -= step
    return policies, bound


def _mixed(image: Floats, policies: list[NDArray[np.int64]], weights: list[float]) -> float:
    """zᵀ convex z of a mixture."""
    return sum(
        w * float(image[policy].sum()) for w, policy in zip(weights, policies, strict=True) if w > 0
    )


def _improved(form: _Form, cells: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Change one unit or two as long as that lowers f and keeps the budgets."""
    problem = form.problem
    costs = problem.costs[:, form.unit, form.candidate]
    cells = cells.copy()
    image = form.q[:, cells].sum(axis=1)
    # rounding of the updates must not pass for a gain, lest changes go in circles
    noise = 1e-12 * max(float(np.abs(form.linear).max()), float(np.abs(form.q).max()))
    idle = 0
    while idle < 2:
        here = cells[form.unit]  # the chosen cell of each cell's unit
        gain = form.linear - form.linear[here] + image - image[here]
        added = costs - costs[:, here]
        slack = problem.budgets - problem.total_costs(form.choice(cells))
        single = np.where((added <= slack[:, None]).all(axis=0), gain, np.inf)
        moved = [int(single.argmin())]
        least = float(single[moved[0]])
        drawn = np.arange(len(gain))
        if len(drawn) > NEIGHBOURS:
            drawn = np.sort(rng.choice(drawn, NEIGHBOURS, replace=False))
        both = _of_two(form, drawn, here, gain)
        both[~_fit_together(added[:, drawn], slack)] = np.inf
        if both.min() < least:
            moved = drawn[list(np.unravel_index(int(both.argmin()), both.shape))].tolist()
            least = float(both.min())
        if not least < -noise:
            idle += 1 if len(drawn) < len(gain) else 2
            continue
        idle = 0
        for cell in moved:
            image += form.q[:, cell] - form.q[:, cells[form.unit[cell]]]
            cells[form.unit[cell]] = cell
    return cells


def _of_two(form: _Form, drawn: NDArray[np.int64], here: NDArray[np.int64], gain: Floats) -> Floats:
    """(drawn, drawn) change of f by taking two cells of different units together."""
    old = here[drawn]
    together = (
        form.q[np.ix_(drawn, drawn)]
        - form.q[np.ix_(drawn, old)]
        - form.q[np.ix_(old, drawn)]
        + form.q[np.ix_(old, old)]
    )
    both: Floats = gain[drawn, None] + gain[drawn] + together
    both[form.unit[drawn][:, None] == form.unit[drawn]] = np.inf
    return both


def _fit_together(
    added: Floats | NDArray[np.int64], slack: Floats | NDArray[np.int64]
) -> NDArray[np.bool_]:
    fit = np.ones((added.shape[1],) * 2, np.bool_)
    for cost, room in zip(added, slack, strict=True):
        fit &= cost[:, None] + cost <= room
    return fit
