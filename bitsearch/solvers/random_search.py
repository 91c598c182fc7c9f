"""Random search on the real loss: the control of every other measured solver.

Bergstra and Bengio, "Random search for hyper-parameter optimization", JMLR 13,
2012. Draws mixes that fill the budget, measures each on all calibration text,
keeps the best.
"""

from __future__ import annotations

import numpy as np

from bitsearch.solvers.ladders import make_ladders, repaired
from bitsearch.solvers.measured import (
    Loss,
    StudyPlace,
    Traits,
    everywhere,
    measured_solution,
)
from bitsearch.solvers.problem import Choice, Problem, Solution


def solve(
    problem: Problem,
    loss: Loss,
    *,
    tokens: int,
    seed: int = 0,
    traits: Traits | None = None,
    study: StudyPlace | None = None,
) -> Solution:
    """Measure random mixes of the budget's bytes, keep the best.

    Raises:
        InfeasibleBudget: even the cheapest choice exceeds the budget.
        UsageError: there are several resources, or costs are not integers.
    """
    ladders = make_ladders(problem, "random")
    best: tuple[float, Choice] | None = None
    # small problems have fewer mixes than the tokens could pay for
    for draw in range(max(1, 2 * tokens // (loss.pieces * loss.piece_tokens))):
        rng = np.random.default_rng([seed, draw])
        levels = repaired(ladders, rng.integers(ladders.top + 1), rng)
        choice = ladders.choice(levels)
        kl = everywhere(loss, choice)
        if best is None or kl < best[0]:
            best = kl, choice
        if loss.spent >= tokens:
            break
    assert best is not None
    return measured_solution(problem, best[1])
