"""The command line: parsing and printing only. Torch is imported inside commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bitsearch.commands_export import add_commands
from bitsearch.console import Stages, emit, reporting
from bitsearch.errors import UsageError
from bitsearch.options import (
    AtLeast,
    Budgets,
    CalibrationText,
    Candidates,
    Damage,
    Device,
    Distinct,
    Dtype,
    Estimated,
    EvaluationText,
    External,
    Freeze,
    Fuse,
    Json,
    Latency,
    Length,
    MaybeBudgets,
    Model,
    Out,
    Prepare,
    ProxyQuantizer,
    Quantizer,
    Revision,
    Seed,
    SelectionText,
    Statistics,
    Target,
    Text,
    Tie,
    Windows,
    external_paths,
    frozen_formats,
    least_bits,
    offered,
    own_texts,
)
from bitsearch.profile_command import profile

if TYPE_CHECKING:
    from bitsearch.session import Session

app = typer.Typer(
    name="bitsearch",
    help="Find the best mixed-precision policy of a language model within a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    model: Model,
    budget: Budgets,
    candidates: Candidates = None,
    freeze: Freeze = None,
    fuse: Fuse = None,
    target: Target = None,
    prepare: Prepare = None,
    units: Annotated[bool, typer.Option("--units", help="List every unit.")] = False,
    revision: Revision = None,
    json_: Json = False,
) -> None:
    """Feasible range, size and cost of a search, from the configuration alone."""
    with reporting():
        from bitsearch.plan import make_plan
        from bitsearch.printing import print_plan

        found = make_plan(
            model,
            budget,
            candidates=candidates,
            frozen=frozen_formats(freeze) or {},
            fuse=fuse is not False,
            revision=revision,
            target=target,
            prepare=prepare,
        )
        emit(found, json_, lambda: print_plan(found, units))


@app.command()
def measure(
    model: Model,
    out_: Out = None,
    damage: Damage = "fisher_output",
    quantizer: Quantizer = None,
    proxy_quantizer: ProxyQuantizer = None,
    prepare: Prepare = None,
    external: External = None,
    candidates: Candidates = None,
    freeze: Freeze = None,
    fuse: Fuse = None,
    target: Target = None,
    text: Text = None,
    calibration_text: CalibrationText = None,
    selection_text: SelectionText = None,
    evaluation_text: EvaluationText = None,
    length: Length = None,
    windows: Windows = None,
    dtype: Dtype = None,
    seed: Seed = None,
    revision: Revision = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Measure a damage table; resumable, and reused by every search in the run."""
    with (
        reporting(),
        _session(
            model, out_, device, candidates=candidates, frozen=frozen_formats(freeze), fuse=fuse,
            texts=text, own_texts=own_texts(calibration_text, selection_text, evaluation_text),
            length=length, windows=windows, dtype=dtype, seed=seed, revision=revision,
            quantizer=quantizer, target=target, prepare=prepare,
            external=external_paths(external), proxy_quantizer=proxy_quantizer,
        ) as session,
        Stages() as stages,
    ):  # fmt: skip
        from bitsearch.damage import measure as measure_damage

        session.save()
        table = measure_damage(session, damage, stages)
        path = session.run.path / "tables" / f"{damage}.safetensors"
        found = {
            "model": session.settings.model,
            "estimator": damage,
            "units": table.shape[0],
            "candidates": table.shape[1],
            "table": str(path),
        }
        shape = f"{table.shape[0]} units × {table.shape[1]} candidates"
        emit(found, json_, lambda: typer.echo(f"{shape} in {path}"))


@app.command()
def search(
    model: Model,
    budget: MaybeBudgets = None,
    recipe: Annotated[
        str | None, typer.Option(help="Preset of a published system, or a TOML file of one's own.")
    ] = None,
    out_: Out = None,
    damage: Annotated[
        str | None,
        typer.Option(help="See `bitsearch list estimators`.  [default: fisher_output]"),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="See `bitsearch list solvers`.  [default: pareto_dp]")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calibration tokens that a measured solver may spend.  [default: 64 passes]",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="URL of a database for the solver's study.  [default: a file in the run]"
        ),
    ] = None,
    quantizer: Quantizer = None,
    proxy_quantizer: ProxyQuantizer = None,
    prepare: Prepare = None,
    external: External = None,
    candidates: Candidates = None,
    freeze: Freeze = None,
    at_least: AtLeast = None,
    tie: Tie = None,
    distinct: Distinct = None,
    latency: Latency = None,
    estimated: Estimated = False,
    fuse: Fuse = None,
    target: Target = None,
    text: Text = None,
    calibration_text: CalibrationText = None,
    selection_text: SelectionText = None,
    evaluation_text: EvaluationText = None,
    length: Length = None,
    windows: Windows = None,
    dtype: Dtype = None,
    seed: Seed = None,
    revision: Revision = None,
    device: Device = "auto",
    diagnostics: Annotated[
        int, typer.Option(min=0, help="Random policies and single units measured as diagnostics.")
    ] = 12,
    json_: Json = False,
) -> None:
    """Find the best policy within the budget, checked on the real model."""
    with (
        reporting(),
        _recipe(
            recipe, budget=budget, damage=damage, solver=solver, candidates=candidates, fuse=fuse,
            quantizer=quantizer, prepare=prepare, length=length, windows=windows,
        ) as (used, resolved),
        _session(
            model, out_, device, frozen=frozen_formats(freeze),
            texts=text, own_texts=own_texts(calibration_text, selection_text, evaluation_text),
            dtype=dtype, seed=seed, revision=revision, target=target,
            external=external_paths(external), proxy_quantizer=proxy_quantizer,
            **{name: used[name] for name in _RECIPE_SETTINGS}
            | {"candidates": offered(used["candidates"], used["budget"], model, target, latency)},
        ) as session,
        Stages() as stages,
    ):  # fmt: skip
        from bitsearch.printing import print_result
        from bitsearch.rules import Rules
        from bitsearch.search import Request
        from bitsearch.search import search as run_search

        rules = Rules(least_bits(at_least), tuple(tie or ()), distinct)
        request = Request(
            tuple(used["budget"] or ()),
            used["damage"] or "fisher_output",
            used["solver"] or ("milp" if len(used["budget"] or ()) > 1 else "pareto_dp"),
            diagnostics,
            rules,
            resolved,
            tokens,
            storage,
            latency,
            estimated,
        )
        found = run_search(session, request, stages)
        stages.__exit__()
        emit(found, json_, lambda: print_result(found))


@app.command()
def front(
    run: Annotated[Path, typer.Argument(help="Run directory of a search.")],
    format_: Annotated[str, typer.Option("--format", help="csv or json.")] = "csv",
    measure: Annotated[
        int | None, typer.Option(min=2, help="Measure so many of its points on selection text.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Print the Pareto front of the last search."""
    with reporting():
        from bitsearch.fronts import measure_front, read_front

        if format_ not in ("csv", "json"):
            raise UsageError(f"--format {format_}: write csv or json")
        read_front(run)
        if measure is not None:
            with _session(str(run), None, device) as session, Stages() as stages:
                measure_front(session, measure, stages)
        typer.echo((run / f"front.{format_}").read_text(encoding="utf-8"), nl=False)


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[list[str], typer.Option(help="Text to evaluate on; repeatable.")],
    policy: Annotated[Path | None, typer.Option(help="Policy file; none: the model as is.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model to compare with.  [default: MODEL; of a packed checkpoint, its original]"
        ),
    ] = None,
    statistics: Statistics = None,
    length: Length = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows over all texts.")] = 32,
    dtype: Dtype = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """KL, perplexity and top-1 agreement of a policy, with intervals."""
    with reporting(), Stages() as stages:
        from bitsearch.printing import print_quality
        from bitsearch.score import score_policy

        found = score_policy(
            model,
            policy,
            reference=reference,
            texts=text,
            statistics=statistics,
            length=length or 512,
            windows=windows,
            dtype=dtype or "float32",
            device=device,
            progress=stages,
        )
        stages.__exit__()
        emit(found, json_, lambda: print_quality(found))


add_commands(app)
app.command()(profile)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A policy, a table, or a run directory.")],
    json_: Json = False,
) -> None:
    """Validate a policy, a table or a run."""
    with reporting():
        from bitsearch.check import check_path

        found = check_path(path)
        emit(found, json_, lambda: typer.echo(f"{path}: {found['kind']}, valid"))


@app.command(name="list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="estimators, solvers, formats, quantizers, models, recipes, exporters, targets "
            "or devices."
        ),
    ],
    json_: Json = False,
) -> None:
    """List what can be named on the command line."""
    with reporting():
        from bitsearch.catalogue import catalogue

        found = catalogue(kind)
        rows = "\n".join(f"{row['name']:24} {row['about']}" for row in found)
        emit(found, json_, lambda: typer.echo(rows))


_RECIPE_SETTINGS = ("candidates", "fuse", "quantizer", "prepare", "length", "windows")


@contextmanager
def _recipe(
    name: str | None, **given: Any
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """What is used under a recipe, and the recipe as it is stored."""
    if name is None:
        yield given, None
        return
    from bitsearch.recipes import resolve

    yield resolve(name, given)


@contextmanager
def _session(model: str, out_: Path | None, device: str, **given: Any) -> Iterator[Session]:
    """The session of a model, or of an existing run; only what is given is compared."""
    from bitsearch.session import open_session

    with open_session(model, out_, device, given) as session:
        yield session


def version_text() -> str:
    """The installed version."""
    from importlib.metadata import version

    return f"bitsearch {version('bitsearch')}"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(version_text())
        raise typer.Exit


def main() -> NoReturn:
    """Entry point of the `bitsearch` command."""
    app()
    raise SystemExit(0)
