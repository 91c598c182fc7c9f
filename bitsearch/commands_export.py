"""The commands `quantize`, `export` and `import`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsearch.console import Stages, emit, reporting
from bitsearch.options import Device, Json, Model, Statistics


def quantize(
    model: Model,
    policy: Annotated[Path, typer.Option(help="Policy file.")],
    out_: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")],
    packed: Annotated[
        bool, typer.Option("--packed", help="Exact bytes, in bitsearch's own layout.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16 or float32.  [default: float16 if the model is, else bfloat16]"
        ),
    ] = None,
    statistics: Statistics = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint.")] = False,
    json_: Json = False,
) -> None:
    """Write a checkpoint of a policy that transformers loads, or a packed one."""
    with reporting(), Stages() as stages:
        from bitsearch.checkpoint import quantize_model
        from bitsearch.printing import print_checkpoint

        found = quantize_model(
            model,
            policy,
            out_,
            packed=packed,
            dtype=dtype,
            statistics=statistics,
            device=device,
            force=force,
            progress=stages,
        )
        stages.__exit__()
        emit(found, json_, lambda: print_checkpoint(found))


def export(
    policy: Annotated[Path, typer.Argument(help="Policy file.")],
    to: Annotated[str, typer.Option("--to", help="See `bitsearch list exporters`.")],
    out_: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    model: Annotated[
        str | None, typer.Option(help="The model: writes its weights too, where the target can.")
    ] = None,
    allow_loss: Annotated[
        str | None, typer.Option(help="Codes of accepted losses, separated by commas.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What engines run it in: bfloat16, float16 or float32.  [default: own]"),
    ] = None,
    statistics: Statistics = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an export.")] = False,
    json_: Json = False,
) -> None:
    """Write a policy as another tool reads it, and say what is lost."""
    with reporting(), Stages() as stages:
        from bitsearch.exporters.pipeline import export_policy
        from bitsearch.printing import print_export

        found = export_policy(
            policy,
            to,
            out_,
            model=model,
            allowed={code.strip() for code in (allow_loss or "").split(",") if code.strip()},
            dtype=dtype,
            statistics=statistics,
            device=device,
            force=force,
            progress=stages,
        )
        stages.__exit__()
        emit(found, json_, lambda: print_export(found))


def import_(
    file: Annotated[Path, typer.Argument(help="The other tool's file, or its folder.")],
    from_: Annotated[str, typer.Option("--from", help="See `bitsearch list exporters`.")],
    model: Annotated[str, typer.Option(help="The unquantized model.")],
    out_: Annotated[Path, typer.Option("--out", "-o", help="Policy file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file.")] = False,
    json_: Json = False,
) -> None:
    """Make a policy of another tool's mixed configuration."""
    with reporting():
        from bitsearch.exporters.pipeline import import_policy

        found = import_policy(file, from_, model, out_, force=force)
        size = f"{found['bytes']:,} bytes, {found['bpw']:.3f} bpw"
        lines = [
            f"{found['policy']}: {size}",
            *(f"not in the policy: {note}" for note in found["notes"]),
        ]
        emit(found, json_, lambda: typer.echo("\n".join(lines)))


def add_commands(app: typer.Typer) -> None:
    """Add all three to the command line."""
    app.command()(quantize)
    app.command()(export)
    app.command(name="import")(import_)
