"""Pair terms as an integer linear program: exact, for few units.

The product w = z[u, c] z[v, d] of two 0-1 variables becomes a variable of its
own, tied to them by

    Σ_d w[u, c, v, d] = z[u, c],   Σ_c w[u, c, v, d] = z[v, d],   w ≥ 0

for every pair of units: the first level of Sherali and Adams (SIAM J. Discrete
Mathematics 3, 1990), tighter than w ≥ z + z' − 1, and exact at integer z.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import coo_array, csr_array, hstack

from bitsearch.solvers.milp import Program, formulate, optimum
from bitsearch.solvers.problem import Choice, Problem


def products(problem: Problem) -> int:
    """How many products of two units' candidates the program has."""
    options = (problem.damage < np.inf).sum(axis=1)
    return int((options.sum() ** 2 - (options**2).sum()) // 2)


def solve_linearised(
    problem: Problem, relative_gap: float, time_limit: float
) -> tuple[Choice, float]:
    """The best choice of a problem with pair terms and without ties, and a lower bound.

    Raises:
        InfeasibleBudget: no choice keeps all budgets.
        OutOfResources: nothing feasible was found within the time limit.
    """
    return optimum(_with_products(problem), problem, relative_gap, time_limit)


def _with_products(problem: Problem) -> Program:
    assert problem.pairs is not None
    program = formulate(replace(problem, pairs=None))
    variables = len(program.units)
    first, second = np.triu_indices(variables, 1)
    apart = program.units[first] != program.units[second]
    first, second = first[apart], second[apart]
    count = len(first)
    cells = problem.pairs.astype(np.float64)
    terms = cells[
        program.units[first],
        program.candidates[first],
        program.units[second],
        program.candidates[second],
    ]
    # one row for each z and other unit: the products with that unit's candidates sum to z
    width = len(problem.damage)
    rows = np.concatenate(
        [first * width + program.units[second], second * width + program.units[first]]
    )
    used, row = np.unique(rows, return_inverse=True)
    columns = variables + np.tile(np.arange(count), 2)
    shape = (len(used), variables + count)
    sums = coo_array((np.ones(2 * count), (row, columns)), shape)
    sums = sums - coo_array((np.ones(len(used)), (np.arange(len(used)), used // width)), shape)
    shape = (width, variables + count)
    one_each = coo_array((np.ones(variables), (program.units, np.arange(variables))), shape)
    return replace(
        program,
        objective=np.concatenate([program.objective, terms / program.damage_scale]),
        integrality=np.concatenate([program.integrality, np.zeros(count, np.int64)]),
        costs=hstack([program.costs, csr_array((program.costs.shape[0], count))]).tocsr(),
        rules=[LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(sums.tocsr(), 0, 0)],
    )
