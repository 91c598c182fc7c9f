"""Damage tables: written cell by cell, complete ones as safetensors.

A table is (units × candidates) float64. While it is measured, each cell is a
journal line; when all allowed cells are there, the table is written as
`tables/NAME.safetensors` whose header holds its signature and names, and the
journal goes. Anybody may put a table of their own in its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bitsearch.errors import BadInput
from bitsearch.run import Run, atomic_write, check_same
from bitsearch.space import Space

SCHEMA = "bitsearch.table/1"
Cell = tuple[int, int]


def complete_table(run: Run, name: str) -> bool:
    """Whether the table of a name is finished."""
    return _path(run, name).exists()


def load_table(run: Run, name: str, space: Space) -> NDArray[np.float64]:
    """A finished (units, candidates) damage table, +inf where not allowed.

    Raises:
        BadInput: missing, damaged, or not of this space.
    """
    damage, header = read_table(_path(run, name))
    check_same(header["units"], [u.name for u in space.units], _path(run, name), "units")
    check_same(
        header["candidates"], [c.name for c in space.candidates], _path(run, name), "candidates"
    )
    damage = np.where(space.allowed, damage, np.inf)
    if np.isnan(damage).any() or not np.isfinite(damage[space.allowed]).all():
        row, column = np.argwhere(~np.isfinite(np.where(space.allowed, damage, 0)))[0]
        raise BadInput(
            f"{_path(run, name)}: the damage of {space.units[row].name} in "
            f"{space.candidates[column].name} is not a finite number"
        )
    return damage


def read_table(path: Path) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The array and the header of a table file.

    Raises:
        BadInput: missing, damaged, or of another schema.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("bitsearch", "{}"))
            damage = np.asarray(file.get_tensor("damage"), np.float64)
    except (OSError, SafetensorError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"table {path} cannot be read: {error}") from error
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise BadInput(f"table {path} has schema {schema!r}, not {SCHEMA!r}")
    for name, kind in (("units", list), ("candidates", list), ("signature", dict)):
        if not isinstance(header.get(name), kind):
            raise BadInput(f"table {path} names no {name} in its header")
    shape = (len(header["units"]), len(header["candidates"]))
    if damage.shape != shape:
        raise BadInput(f"table {path} has shape {damage.shape}, its header says {shape}")
    return damage, header


def measure_table(
    run: Run,
    name: str,
    space: Space,
    signature: dict[str, Any],
    estimate: Callable[[Sequence[Cell]], Iterator[tuple[int, int, float]]],
    done: Callable[[int, int], None],
) -> NDArray[np.float64]:
    """Measure the cells that are missing, and finish the table.

    Args:
        run: where the table lives.
        name: of the table.
        space: what is measured.
        signature: settings that give the numbers their meaning.
        estimate: yields (unit, candidate, damage) of the cells asked for.
        done: called with the numbers of finished and of all cells.

    Raises:
        SettingsMismatch: stored cells were measured with other settings.
    """
    signature = json.loads(json.dumps(signature))
    if complete_table(run, name):
        check_same(read_table(_path(run, name))[1]["signature"], signature, _path(run, name))
        return load_table(run, name, space)
    journal = run.journal(f"tables/{name}.journal")
    if not journal.records:
        journal.append({"signature": signature})
    damage = np.zeros(space.allowed.shape)
    measured = np.zeros(space.allowed.shape, dtype=bool)
    try:
        check_same(journal.records[0]["signature"], signature, journal.path)
        for unit, candidate, value in journal.records[1:]:
            damage[unit, candidate], measured[unit, candidate] = value, True
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{journal.path} holds no cells of this table; delete it to measure anew"
        ) from error
    missing = [(int(u), int(c)) for u, c in np.argwhere(space.allowed & ~measured)]
    total = int(space.allowed.sum())
    done(total - len(missing), total)
    if missing:
        for unit, candidate, value in estimate(missing):
            if not np.isfinite(value):
                value = float(np.finfo(np.float64).max) / (2 * total)
            journal.append([unit, candidate, value])
            damage[unit, candidate], measured[unit, candidate] = value, True
            done(int(measured.sum()), total)
    _write(run, name, space, damage, signature)
    journal.remove()
    return load_table(run, name, space)


def _write(
    run: Run, name: str, space: Space, damage: NDArray[np.float64], signature: dict[str, Any]
) -> None:
    header = {
        "schema": SCHEMA,
        "estimator": name,
        "units": [unit.name for unit in space.units],
        "candidates": [candidate.name for candidate in space.candidates],
        "signature": signature,
    }
    content = save(
        {"damage": damage, "bytes": space.bytes, "allowed": space.allowed.astype(np.uint8)},
        metadata={"bitsearch": json.dumps(header)},
    )
    atomic_write(_path(run, name), content)


def _path(run: Run, name: str) -> Path:
    return run.path / "tables" / f"{name}.safetensors"
