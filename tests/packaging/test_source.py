"""Rules that the source keeps: layers, declared dependencies, nothing unpickled."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

# Low to high; a module imports only its own layer and those below.
LAYERS = (
    {"errors", "formats", "registry", "units"},
    {"kernels", "quantizers"},
    {"corpora", "models", "policy", "rules", "space", "targets", "texts"},
    {"objectives"},
    {"preparations", "solvers"},
    {"appearing", "budget", "evaluate", "run", "settings", "tables"},
    {"external", "plan", "profile", "recipes", "session"},
    {
        "calibration_loss",
        "checkpoint",
        "contenders",
        "damage",
        "diagnostics",
        "fronts",
        "interactions",
        "judge",
        "proxy",
        "record",
        "restore",
        "result",
        "score",
        "search",
        "timed",
    },
    {"catalogue", "check", "exporters", "report", "testing", "testing_devices", "testing_measured"},
    {"__main__", "cli", "commands_export", "console", "options", "printing", "profile_command"},
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}

UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_ARGUMENTS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}


@pytest.fixture(scope="module")
def trees(modules: dict[str, Path]) -> dict[str, ast.Module]:
    """The syntax tree of every module."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    """The project table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(table["project"])


def test_every_part_of_the_package_has_a_layer(trees: dict[str, ast.Module]) -> None:
    parts = {name.split(".")[1] for name in trees if "." in name}
    assert parts <= LAYER.keys(), "say in LAYERS what the new part may import"


def test_nothing_imports_upwards(trees: dict[str, ast.Module], modules: dict[str, Path]) -> None:
    upwards = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imported(tree, name, modules)
        if layer(target) > layer(name)
    ]
    assert upwards == []


def test_imports_have_no_cycle(trees: dict[str, ast.Module], modules: dict[str, Path]) -> None:
    graph = {
        name: {target for target in imported(at_import(tree), name, modules) if target in modules}
        for name, tree in trees.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_solvers_see_only_arrays(trees: dict[str, ast.Module], modules: dict[str, Path]) -> None:
    heavy = {"safetensors", "torch", "transformers"}
    found = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        if name.startswith("bitsearch.solvers")
        for target in imported(tree, name, modules)
        if target.split(".")[0] in heavy
    ]
    assert found == []


def test_imports_are_declared(
    trees: dict[str, ast.Module], modules: dict[str, Path], project: dict[str, Any]
) -> None:
    always = {distribution(text) for text in project["dependencies"]}
    extras = {
        distribution(text)
        for extra, texts in project["optional-dependencies"].items()
        if extra != "dev"
        for text in texts
    }
    undeclared = set()
    for name, tree in trees.items():
        needed = third_party(imported(at_import(tree), name, modules))
        undeclared |= {f"{name} imports {part}" for part in needed - always}
        wanted = third_party(imported(tree, name, modules))
        undeclared |= {f"{name} imports {part} late" for part in wanted - always - extras}
    assert undeclared == set()


def test_nothing_is_unpickled(trees: dict[str, ast.Module], modules: dict[str, Path]) -> None:
    found = []
    for name, tree in trees.items():
        for target in imported(tree, name, modules):
            if target.split(".")[0] in UNPICKLERS or target == "torch.load":
                found.append(f"{name} imports {target}")
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name("torch"), attr="load"):
                    found.append(f"{name}:{node.lineno} torch.load")
                case ast.keyword(arg=str(argument), value=ast.Constant(value)):
                    if argument in UNSAFE_ARGUMENTS and value is UNSAFE_ARGUMENTS[argument]:
                        found.append(f"{name}:{node.lineno} {argument}={value}")
    assert found == []


def layer(name: str) -> int:
    """Number of a module's layer; 0 for `bitsearch` itself and for foreign modules."""
    package, _, inside = name.partition(".")
    return LAYER.get(inside.split(".")[0], 0) if package == "bitsearch" else 0


def imported(tree: ast.AST, name: str, modules: dict[str, Path]) -> Iterator[str]:
    """Dotted names that a module imports; of `from a import b`, `a.b` where that is a module."""
    package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                source = ".".join([*parents, source] if source else parents)
            for alias in node.names:
                child = f"{source}.{alias.name}"
                yield child if child in modules or child == "torch.load" else source


def at_import(tree: ast.Module) -> ast.Module:
    """The part of a module that runs when it is imported."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_If(self, node: ast.If) -> ast.AST:
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return ast.Module(body=node.orelse, type_ignores=[])
            return self.generic_visit(node)

    copy = ast.parse(ast.unparse(tree))
    Outside().visit(copy)
    return copy


def third_party(names: Iterator[str]) -> set[str]:
    """Distributions that hold these modules, without the standard library and bitsearch."""
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bitsearch"}
    holders = distributions()
    return {distribution(holders.get(top, [top])[0]) for top in tops}


@cache
def distributions() -> Mapping[str, list[str]]:
    """Distributions by the modules that they hold; reading it takes a while."""
    return packages_distributions()


def distribution(requirement: str) -> str:
    """The normalized name in a requirement such as `PyYAML>=6`."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()
