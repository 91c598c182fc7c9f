"""The pipeline: tables → solver → contenders → measured on the real model → policy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from bitsearch.budget import Budget, check_feasible, parse_budget, resources
from bitsearch.calibration_loss import solve_measured
from bitsearch.contenders import Contender, byte_matched, distinct, searched, uniforms
from bitsearch.damage import measure
from bitsearch.diagnostics import diagnose
from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.evaluate import summary
from bitsearch.fronts import save_front
from bitsearch.interactions import interaction_terms
from bitsearch.judge import Judge
from bitsearch.kernels.regime import Regime
from bitsearch.objectives.cost.latency import Latency
from bitsearch.objectives.estimators import load_estimator
from bitsearch.policy import Policy, save_policy
from bitsearch.record import make_policy
from bitsearch.result import Judged, make_result
from bitsearch.rules import NO_RULES, Rules
from bitsearch.run import atomic_write
from bitsearch.session import Progress, Session
from bitsearch.solvers import load_solver, milp, pareto_dp
from bitsearch.solvers.measured import needs_loss, refuse_early
from bitsearch.solvers.pareto_dp import Front, front
from bitsearch.solvers.problem import Problem, Solution, Solver
from bitsearch.space import Space
from bitsearch.timed import Timing, open_timing


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one search.

    Attributes:
        budgets: as the user wrote them; all hold at once.
        estimator: name of the damage estimator.
        solver: name of the solver.
        diagnostics: random policies, and single units, measured for diagnostics.
        rules: what else the policy must keep.
        recipe: the resolved recipe that the rest comes from, as it is stored.
        tokens: calibration tokens that a measured solver may spend; None is its default.
        storage: URL of the database of its study; None is a file in the run.
        latency: table of times for budgets of time; None is the run's own.
        estimated: whether a table of another machine will do.
    """

    budgets: tuple[str, ...]
    estimator: str
    solver: str
    diagnostics: int
    rules: Rules = NO_RULES
    recipe: Mapping[str, Any] | None = None
    tokens: int | None = None
    storage: str | None = None
    latency: Path | None = None
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A request that can be kept, as far as that shows before anything is measured.

    Attributes:
        budgets: all hold at once.
        space: the session's, less what rules and the device leave out.
        problem: damage is 0 where allowed.
        solver: `Solver` or `MeasuredSolver`.
        timing: how steps are timed; None without a budget of time.
    """

    budgets: list[Budget]
    space: Space
    problem: Problem
    solver: Any
    timing: Timing | None

    @property
    def measured(self) -> bool:
        """Whether the solver calls the real loss."""
        return needs_loss(self.solver)

    @property
    def has_front(self) -> bool:
        """Whether one exact front holds the best answer for every size."""
        return len(self.budgets) == 1 and self.problem.distinct is None

    @property
    def planner(self) -> Solver:
        """The additive solver: the one asked for, or an exact one beside a measured one."""
        exact = (pareto_dp if self.has_front else milp).solve
        return exact if self.measured else cast(Solver, self.solver)

    @property
    def times(self) -> dict[Regime, Latency]:
        """Milliseconds by regime; empty without a budget of time."""
        return {} if self.timing is None else self.timing.times


def search(session: Session, request: Request, progress: Progress) -> dict[str, Any]:
    """Find, measure and store the best policy within the budgets.

    Returns:
        The result, as `search --json` prints it; `policy` is the path of the file.

    Raises:
        InfeasibleBudget: no policy keeps the budgets; raised before weights are read.
        UsageError: an unknown name, or budgets that cannot be read.
    """
    started = time.monotonic()
    task = _checked(session, request, progress)
    session.save()
    if request.recipe is not None:
        session.run.write_json("recipe.json", request.recipe)
    session.run.log("search", budgets=list(request.budgets), estimator=request.estimator)
    damage = measure(session, request.estimator, progress)
    damage = np.where(task.space.allowed, damage, np.inf)
    measure_seconds = time.monotonic() - started

    problem = replace(task.problem, damage=damage)
    if request.solver == "quadratic":
        terms = interaction_terms(session, damage, partial(progress, "interactions"))
        problem = replace(problem, pairs=terms)
    clock = time.monotonic()
    solution = _solved(session, request, task, problem, progress)
    solver_seconds = time.monotonic() - clock
    curve = front(damage, problem.costs[0], ties=problem.ties) if task.has_front else None
    save_front(session.run, task.space, task.budgets, problem, curve, task.times)

    contenders = _contenders(session, task, problem, solution, curve, progress)
    judge, final = Judge(session, "selection"), Judge(session, "evaluation")
    selected = judge.qualities(contenders, "selection text", progress)
    shipped = min(zip(contenders, selected, strict=True), key=lambda pair: pair[1].mean_kl)[0]
    found = diagnose(
        session, judge, task.space, problem, solution, request.estimator, request.diagnostics,
        progress,
    )  # fmt: skip
    controls = [contender for contender in contenders if contender.is_control]
    held_out = final.qualities([shipped, *controls], "held-out text", progress)

    policy = make_policy(
        session,
        shipped,
        request.estimator,
        request.budgets,
        problem.total_damage(shipped.choice),
        {
            "selection": summary(judge.quality(shipped.choice), judge.reference_nll, judge.corpus),
            "evaluation": summary(held_out[0], final.reference_nll, final.corpus),
        },
        {"solver": request.solver, "gap": solution.gap, "rules": request.rules.describe()}
        | ({} if request.recipe is None else {"recipe": request.recipe["name"]}),
        None if task.timing is None else task.timing.describe(shipped.choice),
    )
    result = {
        "model": session.settings.model,
        "budget": list(request.budgets),
        "recipe": request.recipe,
        **make_result(
            task.space, task.budgets, task.timing, policy, final,
            Judged(shipped, held_out[0]),
            [Judged(*pair) for pair in zip(controls, held_out[1:], strict=True)],
            [Judged(*pair) for pair in zip(contenders, selected, strict=True)],
        ),
        "diagnostics": found,
        "solver": {"name": request.solver, "gap": solution.gap, "seconds": solver_seconds},
        "measure_seconds": measure_seconds,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": _peak_rss(),
        "policy": str(_stored(session, request, policy)),
    }  # fmt: skip
    session.run.write_json("result.json", result)
    session.run.log("done", seconds=result["seconds"])
    return result


def _checked(session: Session, request: Request, progress: Progress) -> Task:
    """What cannot be kept is refused here, before weights are read.

    Raises:
        InfeasibleBudget: no policy keeps the budgets.
        UsageError: an unknown name, or budgets that cannot be read.
    """
    space = request.rules.narrowed(session.space)
    ties = request.rules.ties(space)
    budgets = [parse_budget(text, space) for text in request.budgets]
    if not budgets:
        raise UsageError("no budget given; write --budget 4.5bpw, for example")
    solver = load_solver(request.solver)
    timing = open_timing(session, space, budgets, request.latency, request.estimated, progress)
    times = {} if timing is None else timing.times
    space = space if timing is None else timing.narrowed(space)
    check_feasible(budgets, space, times)
    costs, limits = resources(budgets, space, times)
    # Solved without damage first: budgets that cannot hold together, or that the
    # solver cannot take, are refused before anything is measured.
    nothing = np.where(space.allowed, 0.0, np.inf)
    task = Task(
        budgets,
        space,
        Problem(nothing, costs, limits, ties, request.rules.distinct),
        solver,
        timing,
    )
    if task.measured:
        refuse_early(solver, task.problem)
    else:
        solver(task.problem, seed=session.settings.seed)
    load_estimator(request.estimator)
    return task


def _solved(
    session: Session, request: Request, task: Task, problem: Problem, progress: Progress
) -> Solution:
    if task.measured:
        named = (request.solver, task.solver)
        return solve_measured(session, problem, named, request.tokens, request.storage, progress)
    return task.planner(problem, seed=session.settings.seed)


def _contenders(
    session: Session,
    task: Task,
    problem: Problem,
    solution: Solution,
    curve: Front | None,
    progress: Progress,
) -> list[Contender]:
    """The answer, its neighbours and the controls: what keeps all budgets, measured where timed."""
    seed = session.settings.seed
    found = searched(problem, solution.choice, curve, task.space, task.planner, seed)
    if task.measured:
        found.append(Contender("additive", task.planner(problem).choice, False))
    if len(task.budgets) == 1:
        found += byte_matched(problem, task.space, seed)
    found = [contender for contender in found if problem.feasible(contender.choice)]
    if task.timing is None:
        return found
    return _within_time(task.timing, found, problem, task.space, task.planner, seed, progress)


def _within_time(
    timing: Timing,
    contenders: list[Contender],
    problem: Problem,
    space: Space,
    planner: Solver,
    seed: int,
    progress: Progress,
) -> list[Contender]:
    """Contenders, uniform formats and repaired answers: those whose steps keep the budgets.

    Raises:
        InfeasibleBudget: none of them does.
    """

    def again(tighter: Problem) -> list[Contender]:
        answer = planner(tighter, seed=seed).choice
        return searched(tighter, answer, None, space, planner, seed)

    # Uniform formats count by what they are measured to take, not by what is predicted.
    untimed = timing.untimed(problem)
    plain = [c for c in uniforms(problem, space) if untimed.feasible(c.choice)]
    others = [c for c in contenders if not c.name.startswith("uniform-")]
    kept = timing.kept(distinct([*others, *plain]), progress)
    kept += timing.repaired(problem, contenders[0].choice, again)
    kept = timing.kept(distinct(kept), progress)
    if not kept:
        raise InfeasibleBudget(
            f"no policy keeps the time when its steps are measured; the table ({timing.path}) "
            "promises too much: profile again, or raise the budget"
        )
    return kept


def _stored(session: Session, request: Request, policy: Policy) -> Path:
    """Write the policy, also under its budgets' names; its path."""
    path = session.run.path / "policy.json"
    content = save_policy(policy).encode()
    atomic_write(path, content)
    slug = "+".join(text.replace("@", "-") for text in request.budgets)
    atomic_write(session.run.path / "policies" / f"{slug}.json", content)
    return path


def _peak_rss() -> int:
    """Peak resident memory of this process in bytes (Linux counts in KiB, macOS in bytes)."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
