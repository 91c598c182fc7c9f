"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsearch.errors import UsageError
from bitsearch.settings import DEFAULT_CANDIDATES

Model = Annotated[
    str, typer.Argument(help="Built-in name, folder, GGUF file, hub id, or a run directory.")
]
Budgets = Annotated[
    list[str],
    typer.Option(
        "--budget", "-b", help="3.5bpw, 3.5bpw@linear, 600MB, 1.2GiB or 0.8x; repeatable."
    ),
]
MaybeBudgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        help="As for `plan`, or a time as 12ms@batch=1; repeatable; a recipe may bring its own.",
    ),
]
Latency = Annotated[
    Path | None,
    typer.Option(
        "--latency", help="Table of `bitsearch profile`.  [default: one that the run makes]"
    ),
]
Estimated = Annotated[
    bool, typer.Option("--estimated", help="Take the table of another machine; nothing is timed.")
]
Candidates = Annotated[
    str | None, typer.Option(help=f"Formats a unit may take.  [default: {DEFAULT_CANDIDATES}]")
]
Freeze = Annotated[
    list[str] | None, typer.Option(help="PATTERN=FORMAT: fix matching units; repeatable.")
]
Fuse = Annotated[
    bool | None,
    typer.Option("--fuse/--no-fuse", help="One format for q/k/v and for gate/up.  [default: fuse]"),
]
AtLeast = Annotated[
    list[str] | None, typer.Option(help="PATTERN=BITS: fewest bits of matching units; repeatable.")
]
Tie = Annotated[
    list[str] | None,
    typer.Option(
        help="PATTERN: one format for all matching units; {block} in it: in each block; repeatable."
    ),
]
Distinct = Annotated[int | None, typer.Option(min=1, help="Most different formats in the policy.")]
Text = Annotated[
    list[str] | None,
    typer.Option(help="Text cut into calibration, selection and evaluation parts; repeatable."),
]
CalibrationText = Annotated[str | None, typer.Option(help="Text for calibration alone.")]
SelectionText = Annotated[str | None, typer.Option(help="Text for selection alone.")]
EvaluationText = Annotated[str | None, typer.Option(help="Held-out text.")]
Length = Annotated[int | None, typer.Option(min=16, help="Tokens a window.  [default: 512]")]
Windows = Annotated[
    str | None,
    typer.Option(help="Calibration, selection and evaluation windows.  [default: 16,16,32]"),
]
Dtype = Annotated[str | None, typer.Option(help="Dtype to compute in.  [default: float32]")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed.  [default: 0]")]
Target = Annotated[
    str | None,
    typer.Option(help="Engine to run it: see `bitsearch list targets`.  [default: portable]"),
]
Revision = Annotated[str | None, typer.Option(help="Hub revision.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run directory.")]
Damage = Annotated[str, typer.Option(help="Damage estimator: see `bitsearch list estimators`.")]
Quantizer = Annotated[
    str | None, typer.Option(help="See `bitsearch list quantizers`.  [default: rtn]")
]
ProxyQuantizer = Annotated[
    str | None,
    typer.Option(help="Measure damage with this cheaper quantizer; its agreement is printed."),
]
Prepare = Annotated[
    str | None,
    typer.Option(help="Exact change of the model before: see `bitsearch list preparations`."),
]
External = Annotated[
    list[str] | None,
    typer.Option(help="FORMAT=CHECKPOINT: weights that another tool quantized; repeatable."),
]
Statistics = Annotated[
    Path | None, typer.Option(help="Calibration statistics, if not beside the policy.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def frozen_formats(freeze: list[str] | None) -> dict[str, str] | None:
    """`--freeze`: format by unit pattern; None if it was not given.

    Raises:
        UsageError: an entry is no PATTERN=FORMAT.
    """
    if not freeze:
        return None
    pairs = [entry.rpartition("=") for entry in freeze]
    if any(not pattern for pattern, _, _ in pairs):
        raise UsageError("--freeze takes PATTERN=FORMAT, such as 'model.embed_tokens=int8-g64'")
    return {pattern: name for pattern, _, name in pairs}


def external_paths(external: list[str] | None) -> dict[str, str] | None:
    """`--external`: path by format name; None if it was not given.

    Raises:
        UsageError: an entry is no FORMAT=PATH, or a format is given twice.
    """
    if not external:
        return None
    pairs = [entry.partition("=") for entry in external]
    if any(not name or not path for name, _, path in pairs):
        raise UsageError("--external takes FORMAT=CHECKPOINT, such as int4-g64=FOLDER")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError("--external names a format twice")
    return {name: path for name, _, path in pairs}


def least_bits(at_least: list[str] | None) -> dict[str, int]:
    """`--at-least`: bits by unit pattern.

    Raises:
        UsageError: an entry is no PATTERN=BITS.
    """
    pairs = [entry.rpartition("=") for entry in at_least or ()]
    if any(not pattern or not bits.isdigit() for pattern, _, bits in pairs):
        raise UsageError("--at-least takes PATTERN=BITS, such as 'model.layers.0.*=4'")
    return {pattern: int(bits) for pattern, _, bits in pairs}


def own_texts(*texts: str | None) -> dict[str, str] | None:
    """The texts given for one purpose alone, by purpose; None if there are none."""
    purposes = ("calibration", "selection", "evaluation")
    given = {p: text for p, text in zip(purposes, texts, strict=True) if text is not None}
    return given or None


def offered(
    candidates: str | None,
    budgets: list[str] | None,
    model: str,
    target: str | None,
    latency: Path | None,
) -> str | None:
    """A new run's candidates: under a budget of time all with a kernel, unless some are named."""
    if candidates is not None or target or (Path(model) / "space.json").is_file():
        return candidates
    from bitsearch.timed import default_candidates

    return default_candidates(budgets or (), latency)
