"""`bitsearch list`: what can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bitsearch import registry
from bitsearch.errors import UsageError

Rows = list[dict[str, Any]]


def catalogue(kind: str) -> Rows:
    """Objects with `name` and `about`.

    Raises:
        UsageError: no such kind.
    """
    kinds: dict[str, Callable[[], Rows]] = {
        "estimators": _estimators,
        "solvers": _solvers,
        "quantizers": _quantizers,
        "preparations": _preparations,
        "devices": _devices,
        "formats": _formats,
        "models": _models,
        "recipes": _recipes,
        "exporters": _exporters,
        "targets": _targets,
    }
    if kind not in kinds:
        raise UsageError(f"cannot list '{kind}'; write one of {', '.join(kinds)}")
    return kinds[kind]()


def _recipes() -> Rows:
    from bitsearch.recipes import load_recipe, recipe_names

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        parts = (f"{part} {getattr(recipe, part)}" for part in ("damage", "solver", "candidates"))
        rows.append(
            {
                "name": name,
                "about": f"{recipe.title}: {', '.join(parts)}",
                **recipe.model_dump(mode="json"),
            }
        )
    return rows


def _estimators() -> Rows:
    from bitsearch.objectives.estimators import ESTIMATORS, GROUP

    return _registered(GROUP, ESTIMATORS)


def _solvers() -> Rows:
    from bitsearch.solvers import GROUP, SOLVERS

    return _registered(GROUP, SOLVERS)


def _quantizers() -> Rows:
    from bitsearch.quantizers import GROUP, QUANTIZERS

    return _registered(GROUP, QUANTIZERS)


def _preparations() -> Rows:
    from bitsearch.preparations import GROUP, PREPARATIONS, load_method

    names = registry.names(GROUP, PREPARATIONS)
    return [{"name": name, "about": load_method(name).about} for name in names]


def _devices() -> Rows:
    from bitsearch.kernels.devices import DEVICES, GROUP

    return _registered(GROUP, DEVICES)


def _formats() -> Rows:
    from bitsearch.formats import parse_format
    from bitsearch.formats.codebook import LUT_BITS
    from bitsearch.formats.gguf import BLOCKS
    from bitsearch.formats.integer import INT_BITS
    from bitsearch.formats.levels import TABLES

    names = [
        f"int{bits}-{group}{zero}"
        for bits in INT_BITS
        for group in ("g32", "g64", "g128", "row")
        for zero in ("", "-sym", "-fz")
    ]
    for kind, table in TABLES.items():
        free = not table.block and table.scale == "float16"
        names += [f"{kind}-g32", f"{kind}-g64", f"{kind}-g128"] if free else [kind]
    names += [*BLOCKS, *(f"lut{bits}-row" for bits in LUT_BITS), "dialect4-b32"]
    # any base takes them, in any count or share
    names += ["int3-g128+fp16x16", "int4-g128+fp16x1%", "int4-g128-sym+int8x3%"]
    names += ["int3-g16-s3", "int3-g16-s3+sparse1%", "lut3-row+sparse0.45%"]
    formats = [parse_format(name) for name in (*names, "bf16", "fp16")]
    return [
        {"name": f.name, "about": f"{8 * f.bytes(4096, 4096) / 4096**2:.4f} bpw at 4096 × 4096"}
        for f in formats
    ]


def _models() -> Rows:
    from bitsearch.models.builtin import BUILTINS

    return [{"name": name, "about": model.about} for name, model in BUILTINS.items()]


def _exporters() -> Rows:
    from bitsearch.exporters import exporter_names, load_exporter

    exporters = {name: load_exporter(name) for name in exporter_names()}
    return [
        {"name": name, "about": exporter.about, "imports": exporter.read is not None}
        for name, exporter in exporters.items()
    ]


def _targets() -> Rows:
    from bitsearch.targets import load_target, target_names

    rows = []
    for name in target_names():
        target = load_target(name)
        runs = "; ".join(rule.formats for rule in target.runs) or "anything"
        exported = f"; export --to {target.exporter}" if target.exporter else ""
        rows.append(
            {
                "name": name,
                "about": f"{target.title}: {runs}{exported}",
                **target.model_dump(mode="json", exclude={"name"}),
            }
        )
    return rows


def _registered(group: str, builtin: Mapping[str, str]) -> Rows:
    """Registered functions with the first line of their docstring."""
    rows = []
    for name in registry.names(group, builtin):
        loaded: Any = registry.load(group, builtin, name)
        rows.append({"name": name, "about": (loaded.__doc__ or "").strip().partition("\n")[0]})
    return rows
