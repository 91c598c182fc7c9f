"""How far from the optimum does each solver end, on damage tables of real models?

    python experiments/solver_gaps/run.py            # writes results.json, prints the table

The tables are measured KL, as `bitsearch measure --damage kl` leaves them. Solvers
on the real loss are given the table's own sum as their loss, for 64 passes: what
they lack there is search, not knowledge. `min_max` has another objective.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from bitsearch.errors import BitsearchError
from bitsearch.solvers import SOLVERS, load_solver
from bitsearch.solvers.measured import Traits, needs_loss
from bitsearch.solvers.monotone import monotone
from bitsearch.solvers.problem import Choice, Problem
from bitsearch.tables import read_table

HERE = Path(__file__).parent
BITS = (3.5, 4.0, 4.5, 5.0, 6.0)  # all bytes over all weights of the units
PIECES, PASSES = 8, 64


class TableLoss:
    """The sum of a table, the same on every piece."""

    pieces, piece_tokens = PIECES, 1

    def __init__(self, problem: Problem) -> None:
        self.spent = 0
        self._problem = problem
        self._seen: set[tuple[bytes, int]] = set()

    def __call__(
        self, choices: Sequence[Choice], pieces: Sequence[int], base: Choice | None = None
    ) -> NDArray[np.float64]:
        """(choices, pieces) damages."""
        policies = [*choices, *([] if base is None else [base])]
        self._seen |= {(policy.tobytes(), piece) for policy in policies for piece in pieces}
        self.spent = len(self._seen)
        return np.array([[self._problem.total_damage(c)] * len(pieces) for c in choices])


def main() -> None:
    """Solve every table at every budget with every solver; what is there is kept."""
    path = HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(row["model"], row["bpw"], row["solver"]) for row in results}
    for table in sorted((HERE / "tables").glob("*.safetensors")):
        damage, header = read_table(table)
        with safe_open(table, framework="numpy") as file:
            costs = np.asarray(file.get_tensor("bytes"), np.int64)
        damage = monotone(damage, costs)
        weights = int(costs[:, header["candidates"].index("bf16")].sum()) // 2
        for bits in BITS:
            problem = Problem(damage, costs[None], np.array([int(bits * weights / 8)]))
            best = load_solver("milp")(problem).damage
            for name in SOLVERS:
                if (table.stem, bits, name) in done:
                    continue
                row = solved(name, problem, best, traits_of(header["units"]))
                results.append({"model": table.stem, "bpw": bits, "solver": name, **row})
                print(results[-1], flush=True)
                versions = {"python": platform.python_version(), "numpy": np.__version__}
                content = json.dumps({"versions": versions, "rows": results}, indent=1)
                path.write_text(content + "\n", encoding="utf-8")
    print_table(results)


def solved(name: str, problem: Problem, best: float, traits: Traits) -> dict[str, Any]:
    """Excess over the optimum, certified gap and seconds of one solver."""
    solver: Any = load_solver(name)
    started = time.perf_counter()
    try:
        if needs_loss(solver):
            loss = TableLoss(problem)
            solution = solver(problem, loss, tokens=PASSES * PIECES, seed=0, traits=traits)
        else:
            solution = solver(problem, seed=0)
    except BitsearchError as error:
        return {"refused": str(error)}
    assert problem.feasible(solution.choice)
    return {
        "excess": solution.damage / best - 1,
        "gap": solution.gap,
        "seconds": time.perf_counter() - started,
    }


def traits_of(units: Sequence[str]) -> Traits:
    """Kinds and depths as the names of the units tell them."""
    blocks = [re.search(r"\.(\d+)\.", name) for name in units]
    last = max(int(match[1]) for match in blocks if match)
    kinds = [re.sub(r"\.\d+\.", ".", name) for name in units]
    return Traits(
        np.unique(kinds, return_inverse=True)[1].astype(np.int64),
        np.array([int(match[1]) / last if match else 0.0 for match in blocks]),
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown: excess by budget, the largest certified gap, the median seconds."""
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n| {model} | {' | '.join(f'{b} bpw' for b in BITS)} | certified gap | seconds |")
        print("|---" * (len(BITS) + 3) + "|")
        for solver in SOLVERS:
            mine = [row for row in rows if (row["model"], row["solver"]) == (model, solver)]
            done = [row for row in mine if "excess" in row]
            cells = [f"{row['excess']:.1%}" if "excess" in row else "refused" for row in mine]
            gaps = [row["gap"] for row in done if row["gap"] is not None]
            gap = f"{max(gaps):.1e}" if gaps else "none"
            seconds = f"{np.median([row['seconds'] for row in done]):.2f}" if done else ""
            print(f"| {solver} | {' | '.join(cells)} | {gap} | {seconds} |")


if __name__ == "__main__":
    main()
