"""`bitsearch profile`: its options, and the table as people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from bitsearch.console import Stages, emit, out, reporting
from bitsearch.errors import UsageError
from bitsearch.options import Json, Revision, Seed


def profile(
    shapes: Annotated[
        str | None, typer.Option(help="Model whose shapes are timed.  [default: smollm2-135m]")
    ] = None,
    file: Annotated[Path, typer.Option("--out", "-o", help="The table's file.")] = Path(
        "profile.jsonl"
    ),
    check: Annotated[
        Path | None,
        typer.Option(help="Check this table on whole models, and keep the result in it."),
    ] = None,
    device: Annotated[str, typer.Option(help="See `bitsearch list devices`, or auto.")] = "auto",
    batch: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,16",
    context: Annotated[
        str | None, typer.Option(help="Tokens in the cache.  [default: 256,1024]")
    ] = None,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts; none by default.")] = "",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads.  [default: cores]")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Formats to time.  [default: all that the device has]")
    ] = None,
    estimate: Annotated[
        str | None,
        typer.Option(help="Time nothing; from launch_us=…,read_gbps=…,gflops=…, or a table."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Passes over all cells.")] = 3,
    seed: Seed = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a table.")] = False,
    json_: Json = False,
) -> None:
    """Time this machine's kernels for a model's shapes: the table of a time budget."""
    with reporting(), Stages() as stages:
        import psutil

        from bitsearch.kernels.regime import Regime
        from bitsearch.profile import (
            check_profile,
            default_contexts,
            estimate_profile,
            make_profile,
        )

        if check is not None:
            found = check_profile(check, shapes, revision=revision, seed=seed or 0, progress=stages)
        else:
            if file.exists() and not force:
                raise UsageError(f"{file} exists; add --force to replace it, or name another --out")
            model = shapes or "smollm2-135m"
            contexts = (
                default_contexts(model, revision)
                if context is None
                else _numbers("--context", context)
            )
            regimes = [
                Regime("decode", size, length)
                for size in _numbers("--batch", batch)
                for length in contexts
            ] + [Regime("prefill", 1, length) for length in _numbers("--prefill", prefill)]
            if not regimes:
                raise UsageError("nothing to time: give --batch with --context, or --prefill")
            asked = {"candidates": candidates, "revision": revision}
            if estimate is not None:
                found = estimate_profile(model, file, regimes, estimate, **asked)
            else:
                found = make_profile(
                    model,
                    file,
                    regimes,
                    **asked,
                    device=device,
                    threads=threads or psutil.cpu_count(logical=False) or 1,
                    rounds=rounds,
                    seed=seed or 0,
                    progress=stages,
                )
        stages.__exit__()
        emit(found, json_, lambda: print_profile(found))


VERDICTS = {
    "time": "good for times",
    "times only": "good for times, not for the order of policies that take about as long",
    "ranking only": "ranking only",
    "neither": "good for neither times nor ranking",
}


def print_profile(found: dict[str, Any]) -> None:
    """A table's cells, or its checks if it has any."""
    protocol = found["protocol"]
    threads = f", {protocol['threads']} threads" if protocol["threads"] else ""
    out.print(
        f"[bold]{escape(found['profile'])}[/]: {found['device']} on "
        f"{escape(', '.join(found['machine'].values()))}, {escape(found['kernels'])}{threads}, "
        f"{protocol['clock']} clock"
    )
    if found["checks"]:
        _print_checks(found)
    else:
        _print_cells(found)
    out.print(f"energy: {escape(str(found['facts'].get('energy', 'no energy')))}")


def _print_cells(found: dict[str, Any]) -> None:
    table = Table(
        Column("launch", no_wrap=True), "rows", "format", Column("µs", justify="right"),
        Column("spread", justify="right"), Column("in step", justify="right"),
        Column("GB/s", justify="right"), Column("error", justify="right"), "", box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for cell in found["table"]:
        if cell["status"] == "unsupported":
            continue
        name = f"rest at {cell['context']}"
        if cell["op"] == "linear":
            name = f"{sum(rows for rows, _ in cell['segments'])}×{cell['k']}"
        table.add_row(
            name,
            str(cell["m"]),
            "+".join(format for _, format in cell["segments"]) or cell["phase"],
            f"{cell['median_us']:.1f}",
            f"{100 * (cell['p75_us'] - cell['p25_us']) / max(cell['median_us'], 1e-9):.0f} %",
            "" if cell["step_us"] is None else f"{cell['step_us']:.1f}",
            f"{cell['bytes'] / cell['median_us'] / 1e3:.1f}" if cell["median_us"] else "",
            f"{cell['error']:.4f}" if cell["op"] == "linear" else "",
            "" if cell["status"] == "ok" else cell["status"],
        )
    out.print(table)
    without = {
        cell["why"] for cell in found["table"] if cell["status"] == "unsupported" and cell["why"]
    }
    for why in sorted(without):
        out.print(f"no kernel: {escape(why)}")
    if (sentinel := found["sentinel"]) is not None:
        out.print(
            f"sentinel drifted by {100 * sentinel['drift']:.1f} % over {found['seconds']:.0f} s; "
            f"processes a core {found['load'][0]:.1f} before, {found['load'][1]:.1f} after"
        )
    if (in_step := found["in_step"]) is not None:
        out.print(
            f"{in_step['steps']} whole steps: sums of lone launches miss "
            f"{100 * in_step['alone_error']:.1f} %, times inside of steps "
            f"{100 * in_step['fitted_error']:.1f} % of each left out: "
            f"{'used' if in_step['used'] else 'not used'}"
        )
    if found["estimated"]:
        out.print("estimated from a few numbers, not measured: search with --estimated")
        return
    out.print(f"not checked yet: bitsearch profile --check {escape(found['profile'])}")


def _print_checks(found: dict[str, Any]) -> None:
    from bitsearch.kernels.profile_file import use_of

    for check in found["checks"]:
        table = Table(
            Column(check["regime"]),
            Column("predicted ms", justify="right"),
            Column("measured ms", justify="right"),
            Column("error", justify="right"),
            Column("wall ms", justify="right"),
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for row in sorted(check["configurations"], key=lambda row: row["measured_us"]):
            error = row["predicted_us"] / row["measured_us"] - 1
            table.add_row(
                row["name"],
                f"{row['predicted_us'] / 1e3:.3f}",
                f"{row['measured_us'] / 1e3:.3f}",
                f"{100 * error:+.1f} %",
                f"{row['wall_us'] / 1e3:.3f}",
            )
        out.print(table)
        verdict = VERDICTS[use_of(check["times"], check["ranks"])]
        out.print(
            f"{check['regime']}: mean error {100 * check['mean_error']:.1f} %, worst "
            f"{100 * check['worst_error']:.1f} %, rank correlation {check['spearman']:.3f}: "
            f"[bold]{verdict}[/]"
        )


def _numbers(option: str, text: str) -> list[int]:
    """Positive numbers between commas.

    Raises:
        UsageError: something else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and 0 < int(part) <= 10**6 for part in parts):
        raise UsageError(f"{option} {text}: write numbers such as 1,16")
    return [int(part) for part in parts]
