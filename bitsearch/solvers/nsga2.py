"""NSGA-II on the real loss: a front of (KL, bytes) under a budget.

Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
Trans. Evolutionary Computation 6, 2002, as Optuna implements it; AMQ uses it for
bit allocation. A gene is the rung of one unit. Offspring above the budget are
brought back to it by random steps down. The first population is the exact front
of the additive model, spread over bytes, filled up with random policies.
"""

from __future__ import annotations

import numpy as np
from optuna.samplers import NSGAIISampler
from optuna.trial import Trial

from bitsearch.solvers import pareto_dp
from bitsearch.solvers.front import non_dominated
from bitsearch.solvers.ladders import Ladders, make_ladders, repaired
from bitsearch.solvers.measured import Loss, StudyPlace, Traits, measured_solution
from bitsearch.solvers.problem import Choice, Problem, Solution
from bitsearch.solvers.study import minimise

POPULATION = 20
FROM_FRONT = 8


def solve(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """The least measured KL within the budget of an NSGA-II front.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    found = front(problem, loss, tokens=tokens, seed=seed, study=study)
    return measured_solution(problem, min(found, key=lambda point: point[1])[0])


def front(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    study: StudyPlace | None = None,
) -> list[tuple[Choice, float]]:
    """Policies with their measured KL, none of which beats another, by rising bytes.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    ladders = make_ladders(problem, "nsga2")

    def propose(trial: Trial) -> Choice:
        top = ladders.top
        levels = np.array([trial.suggest_int(f"u{u}", 0, int(top[u])) for u in range(len(top))])
        if ladders.total(levels) > ladders.budget:
            levels = repaired(ladders, levels, np.random.default_rng([seed, trial.number]))
        return ladders.choice(levels)

    def size(choice: Choice) -> int:
        return int(problem.total_costs(choice)[0])

    archive = minimise(
        propose,
        loss,
        sampler=lambda one: NSGAIISampler(population_size=POPULATION, seed=one),
        seed=seed,
        tokens=tokens,
        place=study,
        values=lambda choice, kl: (kl, size(choice)),
        objectives=2,
        first=_first(ladders),
    )
    points = np.array([(kl, size(choice)) for choice, kl in archive], np.float64)
    kept = np.flatnonzero(non_dominated(points))
    return [archive[index] for index in kept[points[kept, 1].argsort(kind="stable")]]


def _first(ladders: Ladders) -> list[dict[str, int]]:
    """Points of the exact front, from the budget down to the fewest bytes."""
    problem = ladders.problem
    exact = pareto_dp.front(problem.damage, problem.costs[0], budget=ladders.budget, max_points=512)
    sizes = np.linspace(exact.bytes[-1], exact.bytes[0], FROM_FRONT)
    found = [ladders.levels(exact.choice(exact.within(float(limit)))) for limit in sizes]
    return [{f"u{unit}": int(level) for unit, level in enumerate(one)} for one in found]
