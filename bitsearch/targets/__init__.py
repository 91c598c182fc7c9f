"""Targets: what an engine runs, known before a search begins. One TOML file each.

A target says which formats the engine has kernels for, for which kinds of units and
shapes; what it fuses or stores together; and in which layout its files hold the weights,
whose bytes a budget then counts. A search for a target is never offered what the target
refuses. A user's own file is read the same way.

`portable`, the default, keeps to what no engine goes without: groups that divide the rows,
wherever a candidate of the same width has them. `none` lifts that.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format, parse_formats
from bitsearch.targets.stored import STORED, Stored
from bitsearch.units import ModelLayout, Unit

DEFAULT_TARGET = "portable"
_FOLDER = Path(__file__).parent
_EXPERTS = re.compile(r"(.*\.experts)\b")

# `tied` is an embedding that is the head too.
Kind = Literal["linear", "fused", "experts", "embedding", "tied", "head"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(_Strict):
    """Formats that an engine runs, where.

    Attributes:
        formats: as `--candidates` takes them.
        units: kinds of units.
        rows: the output features of every matrix are a multiple of it.
        columns: so are the input features.
    """

    formats: str
    units: list[Kind] = ["linear", "fused", "experts", "head"]
    rows: int = Field(default=1, ge=1)
    columns: int = Field(default=1, ge=1)

    @cached_property
    def parsed(self) -> frozenset[Format]:
        """The formats."""
        return frozenset(parse_formats(self.formats))


class Target(_Strict):
    """An engine at a version.

    Attributes:
        name: of the file, or its path.
        title: the engine, its version and device.
        source: where this is known from: code that was read, or what was run.
        exporter: the exporter that writes for it; None if there is none to name.
        stored: the layout of its files, one of `bitsearch.targets.stored.STORED`.
        candidates: what a search is offered if the user names none; None is the default
            of searches.
        fuse: whether q/k/v, and gate/up, are fused and must take one format.
        experts: what takes one format: each `projection` of all experts of a layer, or
            all projections of a `layer`.
        groups: whether group sizes must divide rows; `prefer`: where a candidate of
            the same width does.
        runs: what is run besides 16 bits; empty: anything.
    """

    name: str
    title: str = Field(min_length=1)
    source: str = Field(min_length=1)
    exporter: str | None = None
    stored: str = "packed"
    candidates: str | None = None
    fuse: bool = False
    experts: Literal["projection", "layer"] = "projection"
    groups: Literal["whole", "prefer", "any"] = "whole"
    runs: list[Rule] = []

    @property
    def layout(self) -> Stored:
        """What its files store."""
        return STORED[self.stored]

    def refusal(self, kind: Kind, rows: int, columns: int, format: Format) -> str:
        """Why the engine does not run a matrix in a format; empty if it does.

        Args:
            kind: of the unit that the matrix belongs to.
            rows: output features.
            columns: input features.
            format: 16 bits always run.
        """
        if format.exact:
            return ""
        group = format.group_size
        if self.groups == "whole" and group is not None and columns % group:
            return f"groups of {group} do not divide rows of {columns}"
        if not self.runs:
            return ""
        rules = [rule for rule in self.runs if format in rule.parsed]
        if not rules:
            return f"{self.name} does not run it; it runs {', '.join(r.formats for r in self.runs)}"
        rules = [rule for rule in rules if kind in rule.units]
        if not rules:
            what = "a tied embedding" if kind == "tied" else f"units of kind '{kind}'"
            return f"{self.name} does not run it in {what}"
        if all(rows % rule.rows or columns % rule.columns for rule in rules):
            rule = rules[0]
            return (
                f"{self.name} runs it in matrices whose rows and columns are multiples of "
                f"{rule.rows} and {rule.columns}, not {rows} × {columns}"
            )
        return ""

    def unit_refusal(self, unit: Unit, layout: ModelLayout, format: Format) -> str:
        """Why the engine does not run a unit in a format; empty if it does."""
        kind = unit_kind(unit, layout)
        found = (self.refusal(kind, m.out_features, m.in_features, format) for m in unit.matrices)
        return next((reason for reason in found if reason), "")

    def ties(self, layout: ModelLayout) -> tuple[tuple[int, ...], ...]:
        """Sets of unit indices that must take one format."""
        if self.experts != "layer":
            return ()
        sets: dict[str, list[int]] = {}
        for index, unit in enumerate(layout.units):
            if (match := _EXPERTS.match(unit.name)) is not None:
                sets.setdefault(match[1], []).append(index)
        return tuple(tuple(units) for units in sets.values() if len(units) > 1)


def unit_kind(unit: Unit, layout: ModelLayout) -> Kind:
    """The kind of a unit, as targets tell them apart."""
    if unit.kind == "embedding":
        names = {matrix.name for matrix in unit.matrices}
        return "tied" if any(names & set(group) for group in layout.tied) else "embedding"
    return unit.kind


def target_names() -> list[str]:
    """Names of the targets that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


@cache
def load_target(name: str) -> Target:
    """The target of a name, or of a TOML file.

    Args:
        name: one of `target_names`, or a path that ends in `.toml`.

    Raises:
        UsageError: no such name.
        BadInput: the file cannot be read, or says something impossible.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in target_names():
        known = ", ".join(target_names())
        raise UsageError(f"unknown target '{name}'; known: {known}; or give a file.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"target {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"target {path} is no TOML: {error}") from error
    try:
        target = Target.model_validate({"name": name, **content})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"target {path}: {where}: {first['msg']}") from error
    if target.stored not in STORED:
        raise BadInput(f"target {path}: stored: '{target.stored}' is none of {', '.join(STORED)}")
    try:
        for text in [rule.formats for rule in target.runs] + [target.candidates or "bf16"]:
            parse_formats(text)
    except UsageError as error:
        raise BadInput(f"target {path}: {error}") from error
    return target
