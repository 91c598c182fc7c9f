"""The latency table of a machine, as a file of JSON lines: a header, then one cell a line.

A cell is the time of one launch (`linear`), or of everything in a model's step that
no choice of formats changes (`rest`): attention, norms, the embedding's lookup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitsearch.errors import BadInput
from bitsearch.kernels.devices import Device, Launch, machine_name

SCHEMA: Literal["bitsearch.profile/1"] = "bitsearch.profile/1"

Size = Annotated[int, Field(ge=1, le=2**40)]
Time = Annotated[float, Field(ge=0, lt=1e15)]
Use = Literal["time", "times only", "ranking only", "neither"]
_Line = TypeVar("_Line", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Protocol(_Strict):
    """How cells were timed.

    Attributes:
        clock: `wall`, `thread` or `events`.
        threads: of the processor, None where that says nothing.
        rotation_bytes: weights that a pass goes through before it sees one again.
        rounds: passes over all cells, each in a new random order.
        seed: of weights, inputs and orders.
    """

    clock: str
    threads: int | None = Field(default=None, ge=1)
    rotation_bytes: Size
    rounds: Size
    seed: int = Field(ge=0)


class Sentinel(_Strict):
    """One cell timed again and again while the others were.

    Attributes:
        median_us: of its times.
        drift: range of the medians of three times in a row, as a share of that.
        times: how many.
    """

    median_us: Time
    drift: float = Field(ge=0)
    times: int


class InStep(_Strict):
    """Whether times inside of steps replace those of lone launches.

    Attributes:
        steps: whole steps that were timed.
        alone_error: of the sums of lone launches: root mean square, relative to each step.
        fitted_error: of times inside of steps, of each step when it was left out.
        used: whether they do, see `objectives.cost.in_step`.
    """

    steps: int
    alone_error: float = Field(ge=0)
    fitted_error: float = Field(ge=0)
    used: bool


class Checked(_Strict):
    """One configuration of a model, predicted and measured from end to end."""

    name: str
    predicted_us: Time
    measured_us: Time
    wall_us: Time


class Check(_Strict):
    """What `profile --check` found in one regime.

    Attributes:
        regime: as in a budget, e.g. `batch=1,context=256`.
        configurations: each with its times.
        mean_error: mean |predicted − measured| / measured.
        worst_error: the largest of those.
        spearman: rank correlation of predicted with measured.
        times: whether errors keep the device's bars.
        ranks: whether the rank correlation does; it cannot where all policies take about as long.
    """

    regime: str
    configurations: list[Checked]
    mean_error: float
    worst_error: float
    spearman: float
    times: bool
    ranks: bool


class Header(_Strict):
    """What the cells mean.

    Attributes:
        device: registered name of the device.
        machine: what times depend on; compared before a table is used.
        kernels: version of the kernels, compared as well: of a library, or a source's hash.
        facts: drivers, clocks, caches, energy counter.
        calibration: measured `launch_us`, `read_gbps` and `gflops`.
        model: whose shapes were timed.
        model_type: its architecture family.
        load: processes for each core, before and after.
        estimated: whether cells come from the analytic model, not from measurements.
        checks: one for each regime that was checked.
    """

    schema_: Literal["bitsearch.profile/1"] = Field(default=SCHEMA, alias="schema")
    tool: str
    date: str
    device: str
    machine: dict[str, str]
    facts: dict[str, Any]
    kernels: str
    calibration: dict[str, float]
    protocol: Protocol
    sentinel: Sentinel | None
    in_step: InStep | None = None
    model: str
    model_type: str
    load: tuple[float, float]
    seconds: float
    cells: int
    estimated: bool = False
    checks: list[Check] = []

    @property
    def use(self) -> Use | Literal["unchecked"]:
        """What the table is good for, by all of its checks."""
        if not self.checks:
            return "unchecked"
        times, ranks = (all(getattr(c, bar) for c in self.checks) for bar in ("times", "ranks"))
        return use_of(times, ranks)


def use_of(times: bool, ranks: bool) -> Use:
    """In words, what errors and ranks within their bars make of a table."""
    if times:
        return "time" if ranks else "times only"
    return "ranking only" if ranks else "neither"


class Cell(_Strict):
    """One line of the table.

    Attributes:
        op: `linear`, or `rest`.
        m: tokens of the launch or step.
        k: input features; 0 of a rest.
        segments: rows and format of each run of rows.
        context: tokens in the KV cache, of a rest.
        phase: `decode` or `prefill`, of a rest.
        kernel: the device's name of what ran.
        activations: type that the kernel multiplies in.
        median_us, p25_us, p75_us, min_us: over n samples; of a launch alone.
        step_us: what a launch, or the rest, adds to a whole step; None where no step has it.
        bytes: read and written by a launch; of a rest, its KV cache.
        fixed: share of the median that the smallest launch takes as well.
        error: largest error of the result, see `devices.Timed`.
        status: `ok`; `unstable` if the interquartile range is too wide; `unsupported`.
        why: of an unsupported cell.
    """

    op: Literal["linear", "rest"]
    m: Size
    k: int = Field(ge=0, le=2**40)
    segments: list[tuple[Size, str]]
    context: int | None = None
    phase: Literal["decode", "prefill"] | None = None
    kernel: str
    activations: str
    median_us: Time
    p25_us: Time
    p75_us: Time
    min_us: Time
    step_us: Time | None = None
    n: int
    bytes: int
    fixed: float
    error: float
    status: Literal["ok", "unstable", "unsupported", "estimated"]
    why: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Cell:
        if not self.min_us <= self.p25_us <= self.median_us <= self.p75_us:
            raise ValueError("min, p25, median and p75 are not in order")
        if (self.op == "rest") != (self.phase is not None and self.context is not None):
            raise ValueError("a rest has a phase and a context, a launch has none")
        return self

    @property
    def adds_us(self) -> float:
        """Microseconds that it adds to a step, as far as is known."""
        return self.median_us if self.step_us is None else self.step_us

    @property
    def launch(self) -> Launch:
        """What was timed, of a `linear` cell."""
        return Launch(self.m, self.k, tuple((rows, name) for rows, name in self.segments))


class Profile(_Strict):
    """A table with its header."""

    header: Header
    cells: list[Cell]


def profile_text(header: Header, cells: Sequence[Cell]) -> str:
    """The content of a profile file."""
    lines: Iterable[BaseModel] = (header, *cells)
    return "".join(line.model_dump_json(by_alias=True) + "\n" for line in lines)


def load_profile(path: Path) -> Profile:
    """Read and validate a profile file.

    Raises:
        BadInput: missing, damaged, cut short, or of another schema; the message
            names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise BadInput(f"profile {path} cannot be read: {reason}") from error
    header = _parsed(Header, lines[0] if lines else "", path, 1)
    cells = [_parsed(Cell, line, path, number) for number, line in enumerate(lines[1:], 2)]
    if len(cells) != header.cells:
        raise BadInput(
            f"profile {path} holds {len(cells)} cells, its header says {header.cells}; "
            "make it anew with `bitsearch profile`"
        )
    return Profile(header=header, cells=cells)


def check_machine(profile: Profile, device: Device, path: Path) -> None:
    """Refuse the table of another machine.

    Raises:
        BadInput: it is one; both are named.
    """
    there = profile.header.machine | {"kernels": profile.header.kernels}
    here = device.machine() | {"kernels": device.source()}
    if there != here:
        differing = [key for key in sorted(there.keys() | here) if there.get(key) != here.get(key)]
        raise BadInput(
            f"profile {path} is of another machine ({machine_name(there)}), this one is "
            f"{machine_name(here)}; they differ in {', '.join(differing)}: make a profile here, "
            "or add --estimated to plan for that machine"
        )


def _parsed(kind: type[_Line], line: str, path: Path, number: int) -> _Line:
    try:
        data = json.loads(line)
        schema = data.get("schema") if isinstance(data, dict) else None
        if kind is Header and schema != SCHEMA:
            raise BadInput(
                f"{path} has schema {schema!r}, this bitsearch reads {SCHEMA!r}; give a file "
                "that `bitsearch profile` wrote"
            )
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or kind.__name__.lower()
        raise BadInput(f"profile {path}, line {number}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"profile {path}, line {number} is not JSON: {error}") from error
