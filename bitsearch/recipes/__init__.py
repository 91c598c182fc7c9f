"""Recipes: presets that reproduce published systems, one TOML file each.

A recipe names its source and what differs from it, and sets the parts of a
search: candidates, fusion, quantizer, damage estimator, solver, budget, size of
the calibration text. What it leaves out is the tool's default; what the user
gives replaces it. A user's own file is read the same way.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitsearch import registry
from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_formats
from bitsearch.objectives import estimators
from bitsearch.preparations import GROUP as PREPARATION_GROUP
from bitsearch.preparations import PREPARATIONS
from bitsearch.quantizers import GROUP as QUANTIZER_GROUP
from bitsearch.quantizers import QUANTIZERS
from bitsearch.settings import DEFAULT_WINDOWS
from bitsearch.solvers import GROUP as SOLVER_GROUP
from bitsearch.solvers import SOLVERS

SCHEMA = "bitsearch.recipe/1"
_FOLDER = Path(__file__).parent
_NAMED = {
    "damage": (estimators.GROUP, estimators.ESTIMATORS),
    "solver": (SOLVER_GROUP, SOLVERS),
    "quantizer": (QUANTIZER_GROUP, QUANTIZERS),
    "prepare": (PREPARATION_GROUP, PREPARATIONS),
}


class Recipe(BaseModel):
    """A preset of a search; None where the tool's default holds.

    Attributes:
        title: the system and its year.
        source: paper and section, or tool, file and version.
        differs: each difference from the original, with its reason.
        candidates: formats, as `--candidates` takes them.
        fuse: one format for what engines fuse.
        quantizer: name of the quantizer.
        prepare: name of the preparation.
        damage: name of the damage estimator.
        solver: name of the solver.
        budget: budgets if the user gives none.
        length: tokens a window.
        calibration_windows: windows of calibration text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: str = Field(min_length=1)
    source: str = Field(min_length=1)
    differs: list[str] = []
    candidates: str | None = None
    fuse: bool | None = None
    quantizer: str | None = None
    prepare: str | None = None
    damage: str | None = None
    solver: str | None = None
    budget: list[str] = []
    length: int | None = Field(default=None, ge=16)
    calibration_windows: int | None = Field(default=None, ge=1)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of a name, or of a TOML file.

    Args:
        name: one of `recipe_names`, or a path that ends in `.toml`.

    Raises:
        UsageError: no such name.
        BadInput: the file cannot be read, or says something impossible.
    """
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if path.suffix == ".toml" and not name.endswith(".toml") and name not in recipe_names():
        known = ", ".join(recipe_names())
        raise UsageError(f"unknown recipe '{name}'; known: {known}; or give a file.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"recipe {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"recipe {path} is no TOML: {error}") from error
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"recipe {path}: {where}: {first['msg']}") from error
    try:
        if recipe.candidates is not None:
            parse_formats(recipe.candidates)
    except UsageError as error:
        raise BadInput(f"recipe {path}: candidates: {error}") from error
    for part, (group, builtin) in _NAMED.items():
        value = getattr(recipe, part)
        known_names = registry.names(group, builtin)
        if value is not None and value not in known_names:
            raise BadInput(
                f"recipe {path}: {part}: unknown '{value}'; known: {', '.join(known_names)}"
            )
    return recipe


def resolve(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a search uses under a recipe and the user's own choices.

    Args:
        name: of a recipe, or a file.
        given: what the user gave, None elsewhere: `damage`, `solver`, `budget` and
            settings such as `candidates`, `fuse`, `length`, `windows`.

    Returns:
        `given` with the recipe's parts where the user gave none; and the resolved
        recipe as it is stored with the run, `overridden` naming what the user changed.

    Raises:
        UsageError: no such recipe.
        BadInput: the file is not a usable recipe.
    """
    recipe = load_recipe(name)
    parts = recipe.model_dump(exclude={"title", "source", "differs", "calibration_windows"})
    if recipe.calibration_windows is not None:
        _, _, others = DEFAULT_WINDOWS.partition(",")
        parts["windows"] = f"{recipe.calibration_windows},{others}"
    chosen = {key: value for key, value in given.items() if value not in (None, [])}
    used = {**given, **{key: value for key, value in parts.items() if value not in (None, [])}}
    used |= chosen
    resolved = {
        "schema": SCHEMA,
        "name": name,
        "title": recipe.title,
        "source": recipe.source,
        "differs": recipe.differs,
        **{key: used.get(key) for key in parts},
        "overridden": sorted(
            key
            for key, value in parts.items()
            if value not in (None, []) and chosen.get(key, value) != value
        ),
    }
    return used, resolved
