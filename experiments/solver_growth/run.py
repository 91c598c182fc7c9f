"""How far do the solvers reach? Seconds, peak memory and gap from 1e3 to 1e7 units.

    python experiments/solver_growth/run.py            # writes results.json, prints the table
    python experiments/solver_growth/run.py --units 1e3,1e4 --limit 30

Each cell runs in a process of its own. The time limit is given to those solvers that
take one; a process is ended at twice that time or at 8 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bitsearch.solvers import milp, pareto_dp
from bitsearch.solvers.large import solve as large
from bitsearch.solvers.problem import Problem, Solution

MEMORY = 8 << 30  # bytes a cell
HERE = Path(__file__).parent
BITS = np.array([2, 3, 4, 8])


def groups(units: int, seed: int = 0) -> Problem:
    """Rows of 64 to 1024 weights at 2, 3, 4 or 8 bits, 3.3 bits on average.

    Sensitivities are log-normal (σ = 1.5), damages follow 4^-bits with 20 % noise.
    """
    rng = np.random.default_rng(seed)
    weights = 8 * rng.integers(8, 129, units)
    sensitivity = np.exp(rng.normal(0, 1.5, (units, 1))) * weights[:, None]
    damage = sensitivity * 4.0**-BITS * np.exp(rng.normal(0, 0.2, (units, len(BITS))))
    costs = weights[:, None] * BITS // 8
    return Problem(damage, costs[None], np.array([int(weights.sum() * 3.3 / 8)]))


def cbc(problem: Problem, *, time_limit: float) -> Solution:
    """COIN-OR CBC through PuLP, which installs its binary."""
    import pulp

    units, candidates = problem.damage.shape
    z = [
        [pulp.LpVariable(f"z{u}_{c}", cat="Binary") for c in range(candidates)]
        for u in range(units)
    ]
    program = pulp.LpProblem("policy", pulp.LpMinimize)
    cells = [(u, c) for u in range(units) for c in range(candidates)]
    program += pulp.LpAffineExpression([(z[u][c], problem.damage[u, c]) for u, c in cells])
    program += pulp.LpAffineExpression(
        [(z[u][c], int(problem.costs[0, u, c])) for u, c in cells]
    ) <= int(problem.budgets[0])
    for row in z:
        program += pulp.lpSum(row) == 1
    program.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=1e-9))
    values = np.array([[variable.value() or 0.0 for variable in row] for row in z])
    choice = values.argmax(axis=1)
    return Solution(choice, problem.total_damage(choice), None)


def cell(solver: str, units: int, limit: float) -> dict[str, float | bool | None]:
    """Solve once, in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    problem = groups(units)
    run = {
        "large": large,
        "pareto_dp": pareto_dp.solve,
        "milp": partial(milp.solve, time_limit=limit),
        "cbc": partial(cbc, time_limit=limit),
    }[solver]
    before = time.perf_counter(), time.process_time()
    solution = run(problem)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": time.perf_counter() - before[0],
        "cpu_seconds": time.process_time() - before[1] + usages[1].ru_utime,
        "peak_mib": max(usage.ru_maxrss for usage in usages) / 1024,
        "damage": solution.damage,
        "gap": solution.gap,
        "feasible": problem.feasible(solution.choice),
    }


def measured(solver: str, units: int, limit: float) -> dict[str, object]:
    """Solve in a process of its own; says so if that takes too long."""
    command = [sys.executable, __file__, "--cell", solver, str(units), "--limit", str(limit)]
    row: dict[str, object] = {"solver": solver, "units": units}
    # in a session of its own, so that CBC's own process ends with it
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, complaint = process.communicate(timeout=2 * limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {**row, "failed": f"over {2 * limit:g} s"}
    if process.returncode:
        out_of_memory = "MemoryError" in complaint or "alloc" in complaint
        if "OutOfResources" in complaint:
            return {**row, "failed": f"no choice found in {limit:g} s"}
        last = (complaint.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return {**row, "failed": f"over {MEMORY >> 30} GiB" if out_of_memory else last}
    return {**row, **json.loads(printed)}


def table(rows: list[dict[str, object]]) -> str:
    """The results as Markdown; excess is over the best damage found by any solver."""
    lines = [
        "| units | solver | seconds | CPU seconds | peak MiB | certified gap | excess damage |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        head = f"| {row['units']:,} | {row['solver']} |"
        if "failed" in row:
            lines.append(f"{head} {row['failed']} | | | | |")
            continue
        peers = [r["damage"] for r in rows if r["units"] == row["units"] and "damage" in r]
        gap = "none" if row["gap"] is None else f"{row['gap']:.1e}"
        excess = row["damage"] / min(peers) - 1
        lines.append(
            f"{head} {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['peak_mib']:.0f} "
            f"| {gap} | {excess:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", default="1e3,1e4,1e5,1e6,1e7")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a cell")
    parser.add_argument("--cell", nargs=2, metavar=("SOLVER", "UNITS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options.cell[0], int(options.cell[1]), options.limit)))
        return
    solvers = ["large", "pareto_dp", "milp", *(["cbc"] if find_spec("pulp") else [])]
    packages = ["numpy", "scipy", *(["pulp"] if "cbc" in solvers else [])]
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    rows: list[dict[str, object]] = []
    for units in (int(float(text)) for text in options.units.split(",")):
        for solver in solvers:
            rows.append(measured(solver, units, options.limit))
            print(rows[-1], file=sys.stderr)
            found = {"versions": versions, "limit_seconds": options.limit, "rows": rows}
            (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
