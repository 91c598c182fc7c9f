"""The pipeline: tables → solver → contenders → measured on the real model → policy."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsearch.budget import Budget, check_feasible, parse_budget, resources
from bitsearch.calibration_loss import solve_measured
from bitsearch.contenders import (
    Contender,
    byte_matched,
    distinct,
    random_policies,
    searched,
    uniforms,
)
from bitsearch.diagnostics import additivity, rank_correlation, sensitivity_spread
from bitsearch.errors import InfeasibleBudget, UsageError
from bitsearch.evaluate import Quality, interval, summary
from bitsearch.fronts import save_front
from bitsearch.interactions import interaction_terms
from bitsearch.judge import Judge
from bitsearch.objectives.estimators import load_estimator
from bitsearch.policy import save_policy
from bitsearch.proxy import agreement
from bitsearch.record import make_policy
from bitsearch.rules import NO_RULES, Rules
from bitsearch.run import atomic_write, read_json
from bitsearch.session import Progress, Session
from bitsearch.solvers import load_solver, milp, pareto_dp
from bitsearch.solvers.measured import needs_loss, refuse_early
from bitsearch.solvers.monotone import monotone
from bitsearch.solvers.pareto_dp import front
from bitsearch.solvers.problem import Problem, Solution, Solver
from bitsearch.space import Space
from bitsearch.tables import complete_table, load_table, measure_table
from bitsearch.timed import Timing, open_timing

log = logging.getLogger(__name__)


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


def measure(session: Session, estimator: str, progress: Progress) -> NDArray[np.float64]:
    """The damage table of an estimator, measured as far as it is missing.

    Returns:
        (units, candidates), +inf where not allowed, made monotone in bytes.
    """
    space = session.space
    session.progress = progress
    load = load_estimator(estimator)
    if complete_table(session.run, estimator) and (session.run.path / "model.json").exists():
        damage = load_table(session.run, estimator, space)
    else:
        scoring = session.scoring(session.damage_weights)
        damage = measure_table(
            session.run,
            estimator,
            space,
            session.table_signature(estimator),
            lambda cells: load(scoring, cells),
            lambda done, total: progress(f"damage ({estimator})", done, total),
        )
    if session.settings.proxy_quantizer is not None:
        agreement(session, estimator, damage, partial(progress, "proxy"))
    return monotone(_never_reached(damage, session), space.bytes)


def search(session: Session, request: Request, progress: Progress) -> dict[str, Any]:
    """Find, measure and store the best policy within the budgets.

    Returns:
        The result, as `search --json` prints it; `policy` is the path of the file.

    Raises:
        InfeasibleBudget: no policy keeps the budgets; raised before weights are read.
        UsageError: an unknown name, or budgets that cannot be read.
    """
    started = time.monotonic()
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
    unscored = Problem(nothing, costs, limits, ties, request.rules.distinct)
    measured = needs_loss(solver)
    if measured:
        refuse_early(solver, unscored)
    else:
        solver(unscored, seed=session.settings.seed)
    load_estimator(request.estimator)
    session.save()
    if request.recipe is not None:
        session.run.write_json("recipe.json", request.recipe)
    session.run.log("search", budgets=list(request.budgets), estimator=request.estimator)
    damage = measure(session, request.estimator, progress)
    damage = np.where(space.allowed, damage, np.inf)
    measured_seconds = time.monotonic() - started

    problem = replace(unscored, damage=damage)
    if request.solver == "quadratic":
        terms = interaction_terms(session, damage, partial(progress, "interactions"))
        problem = replace(problem, pairs=terms)
    clock = time.monotonic()
    alone = len(budgets) == 1 and problem.distinct is None
    planner = (pareto_dp if alone else milp).solve if measured else solver
    if measured:
        solution = solve_measured(
            session, problem, (request.solver, solver), request.tokens, request.storage, progress
        )
    else:
        solution = solver(problem, seed=session.settings.seed)
    solver_seconds = time.monotonic() - clock
    curve = front(damage, costs[0], ties=ties) if alone else None
    save_front(session.run, space, budgets, problem, curve, times)

    seed = session.settings.seed
    contenders = searched(problem, solution.choice, curve, space, planner, seed)
    if measured:
        contenders.append(Contender("additive", planner(problem).choice, False))
    if len(budgets) == 1:
        contenders += byte_matched(problem, space, seed)
    contenders = [contender for contender in contenders if problem.feasible(contender.choice)]
    if timing is not None:
        contenders = _within_time(timing, contenders, problem, space, planner, seed, progress)
    judge = Judge(session, "selection")
    selected = _measured(judge, contenders, "selection text", progress)
    shipped = min(zip(contenders, selected, strict=True), key=lambda pair: pair[1].mean_kl)[0]
    found = _diagnose(judge, problem, space, solution, budgets[0], request, session, progress)

    final = Judge(session, "evaluation")
    controls = [contender for contender in contenders if contender.is_control]
    judged = _measured(final, [shipped, *controls], "held-out text", progress)
    selection_quality = judge.quality(shipped.choice)
    policy = make_policy(
        session,
        shipped,
        request.estimator,
        request.budgets,
        problem.total_damage(shipped.choice),
        {
            "selection": summary(selection_quality, judge.reference_nll, judge.corpus),
            "evaluation": summary(judged[0], final.reference_nll, final.corpus),
        },
        {"solver": request.solver, "gap": solution.gap, "rules": request.rules.describe()}
        | ({} if request.recipe is None else {"recipe": request.recipe["name"]}),
        None if timing is None else timing.describe(shipped.choice),
    )
    path = session.run.path / "policy.json"
    atomic_write(path, save_policy(policy).encode())
    slug = "+".join(text.replace("@", "-") for text in request.budgets)
    atomic_write(session.run.path / "policies" / f"{slug}.json", save_policy(policy).encode())

    result = {
        "model": session.settings.model,
        "budget": list(request.budgets),
        "recipe": request.recipe,
        "target": space.target.name,
        "bytes": space.total_bytes(shipped.choice),
        "bpw": 8 * space.total_bytes(shipped.choice) / space.layout.parameters,
        "limit_bytes": [budget.limit for budget in budgets if budget.regime is None],
        "latency": [entry.model_dump() for entry in policy.latency or []],
        "shipped": shipped.name,
        **summary(judged[0], final.reference_nll, final.corpus),
        "controls": [
            _control(contender, quality, judged[0], session) | _times(timing, contender)
            for contender, quality in zip(controls, judged[1:], strict=True)
        ],
        "selection": [
            {"name": c.name, "bytes": space.total_bytes(c.choice), "kl": q.mean_kl}
            | _times(timing, c)
            for c, q in zip(contenders, selected, strict=True)
        ],
        "diagnostics": found,
        "solver": {
            "name": request.solver,
            "gap": solution.gap,
            "seconds": solver_seconds,
        },
        "measure_seconds": measured_seconds,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": _peak_rss(),
        "policy": str(path),
    }
    session.run.write_json("result.json", result)
    session.run.log("done", seconds=result["seconds"])
    return result


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


def _measured(
    judge: Judge, contenders: Sequence[Contender], stage: str, progress: Progress
) -> list[Quality]:
    qualities = []
    for index, contender in enumerate(contenders):
        progress(stage, index, len(contenders))
        qualities.append(judge.quality(contender.choice))
    progress(stage, len(contenders), len(contenders))
    return qualities


def _never_reached(damage: NDArray[np.float64], session: Session) -> NDArray[np.float64]:
    """Score as worst what calibration text never reached: no damage was seen, none is known."""
    lossy = np.array([not candidate.exact for candidate in session.space.candidates])
    known = session.space.allowed & lossy
    silent = ((damage == 0) | ~known).all(axis=1) & known.any(axis=1)
    if not silent.any() or silent.all():
        return damage
    worst = np.where(known & ~silent[:, None], damage, 0).max(axis=0)
    for unit in np.flatnonzero(silent):
        log.warning(
            "%s: calibration text never reached it; scored as the most sensitive unit, "
            "give more text or --freeze it",
            session.space.units[unit].name,
        )
    return np.where(silent[:, None] & known, worst[None], damage)


def _diagnose(
    judge: Judge,
    problem: Problem,
    space: Space,
    solution: Solution,
    budget: Budget,
    request: Request,
    session: Session,
    progress: Progress,
) -> dict[str, Any]:
    """σ and its ceiling, additivity R, rank correlation over random policies, the gap."""
    size = budget.limit if budget.regime is None else space.total_bytes(solution.choice)
    bits = 8 * size / space.layout.parameters
    damage = np.asarray(problem.damage, np.float64)
    sigma, ceiling = sensitivity_spread(damage, space, bits)
    found: dict[str, Any] = {"sigma": _number(sigma), "ceiling": _number(ceiling)}
    found["gap"] = solution.gap
    if session.settings.proxy_quantizer is not None:
        found["proxy"] = read_json(session.run.path / f"tables/{request.estimator}.proxy.json")
    if not request.diagnostics:
        return found

    def alone(unit: int) -> float:
        return judge.alone(solution.choice, unit)

    progress("additivity", 0, 1)
    kl = judge.quality(solution.choice).mean_kl
    ratio, units = additivity(
        damage, solution.choice, kl, alone, request.diagnostics, session.settings.seed
    )
    progress("additivity", 1, 1)
    found |= {"additivity": _number(ratio), "additivity_units": units}
    if len(problem.costs) == 1:
        policies = random_policies(problem, request.diagnostics, session.settings.seed)
        measured = _measured(judge, policies, "random policies", progress)
        predicted = [problem.total_damage(policy.choice) for policy in policies]
        rho = rank_correlation(predicted, [quality.mean_kl for quality in measured])
        found |= {"rank_correlation": _number(rho), "random_policies": len(policies)}
    return found


def _control(
    contender: Contender, quality: Quality, shipped: Quality, session: Session
) -> dict[str, Any]:
    """A control's figures, and by how much the shipped policy beats it, paired."""
    size = session.space.total_bytes(contender.choice)
    difference = shipped.kl - quality.kl
    return {
        "name": contender.name,
        "bytes": size,
        "bpw": 8 * size / session.space.layout.parameters,
        "kl": quality.mean_kl,
        "kl_ci": interval(quality.kl),
        "perplexity": quality.perplexity,
        "difference": float(difference.mean()),
        "difference_ci": interval(difference),
    }


def _times(timing: Timing | None, contender: Contender) -> dict[str, Any]:
    """Milliseconds of a step in each regime; nothing where no time is asked for."""
    if timing is None:
        return {}
    entries = timing.describe(contender.choice)
    return {"ms": {entry.regime: entry.measured_ms or entry.predicted_ms for entry in entries}}


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return None if np.isnan(value) else value


def _peak_rss() -> int:
    """Peak resident memory of this process in bytes (Linux counts in KiB, macOS in bytes)."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
