"""Validate a policy, a table or a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bitsearch.errors import BadInput
from bitsearch.models.preparation import load_preparation
from bitsearch.policy import load_policy
from bitsearch.run import PREPARATION, STATISTICS, Journal, read_json
from bitsearch.settings import stored_settings
from bitsearch.tables import read_table


def check_path(path: Path) -> dict[str, Any]:
    """What a file or folder is, once it is found valid.

    Raises:
        BadInput: it is missing, damaged, inconsistent, or nothing of ours.
    """
    if path.is_dir():
        return _check_run(path)
    if path.suffix == ".safetensors":
        header = _check_table(path)
        return {
            "kind": "table",
            "estimator": header.get("estimator"),
            "units": len(header["units"]),
            "candidates": len(header["candidates"]),
        }
    policy = load_policy(path)
    return {
        "kind": "policy",
        "model": policy.model.reference,
        "tensors": len(policy.modules),
        "bytes": policy.achieved.bytes,
        "bpw": policy.achieved.bpw,
    }


def _check_run(path: Path) -> dict[str, Any]:
    """Every file that a run directory may hold."""
    if not (path / "space.json").is_file():
        raise BadInput(f"{path} is not a run directory: it holds no space.json")
    settings = stored_settings(path)
    contents = {file.name: read_json(file) for file in sorted(path.glob("*.json"))}
    try:
        units = [unit["name"] for unit in contents["space.json"]["units"]]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path / 'space.json'} lists no units") from error
    tables = sorted((path / "tables").glob("*.safetensors"))
    for table in tables:
        if _check_table(table)["units"] != units:
            raise BadInput(f"table {table} has other units than {path / 'space.json'}")
    statistics = path / STATISTICS
    if statistics.exists():
        _check_statistics(statistics)
    if (path / PREPARATION).exists():
        load_preparation(path / PREPARATION)
    journals = sorted([*path.glob("*.journal"), *(path / "tables").glob("*.journal")])
    records = sum(len(Journal(journal).records) for journal in journals)
    policies = sorted([*path.glob("policy.json"), *(path / "policies").glob("*.json")])
    for policy in policies:
        load_policy(policy)
    return {
        "kind": "run",
        "model": settings.model,
        "tables": [table.stem for table in tables],
        "policies": len(policies),
        "records": records,
    }


def _check_table(path: Path) -> dict[str, Any]:
    """The header of a table whose damages are usable."""
    damage, header = read_table(path)
    if np.isnan(damage).any() or (damage < 0).any():
        raise BadInput(f"table {path} holds negative damage, or NaN")
    return header


def _check_statistics(path: Path) -> None:
    """Mean squares are finite and not negative."""
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found = np.asarray(file.get_tensor(name))
                means = found if found.ndim == 1 else found.diagonal()
                if not (np.isfinite(found).all() and (means >= 0).all()):
                    raise BadInput(f"{path}: the mean squares of {name} are not usable")
    except (OSError, SafetensorError, TypeError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error
