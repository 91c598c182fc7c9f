"""What a search leaves behind: the policy and the front."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from bitsearch.budget import Budget
from bitsearch.contenders import Contender
from bitsearch.formats import Format
from bitsearch.policy import (
    Achieved,
    Policy,
    PolicyDamage,
    PolicyFormat,
    PolicyMeasurement,
    PolicyModel,
    PolicyModule,
    PolicyQuantizer,
    PolicyStatistics,
)
from bitsearch.run import STATISTICS, Run, atomic_write
from bitsearch.session import Session
from bitsearch.solvers.pareto_dp import Front
from bitsearch.space import Space

FRONT_POINTS = 400


def make_policy(
    session: Session,
    contender: Contender,
    estimator: str,
    budgets: Sequence[str],
    predicted: float,
    measured: dict[str, dict[str, Any]],
    provenance: dict[str, Any],
) -> Policy:
    """The policy file's content; free of times, so that a resumed run writes the same."""
    space, layout = session.space, session.space.layout
    modules: dict[str, PolicyModule] = {}
    formats: dict[str, PolicyFormat] = {}
    for unit, format in space.assignment(contender.choice):
        formats[format.name] = _declared(format)
        for matrix in unit.matrices:
            modules[matrix.name] = PolicyModule(
                format=format.name,
                unit=unit.name,
                role=matrix.role,
                block=unit.block,
                shape=(matrix.out_features, matrix.in_features),
                count=matrix.count,
                bytes=matrix.count * format.bytes(matrix.out_features, matrix.in_features),
            )
    return Policy(
        model=PolicyModel(
            reference=layout.reference,
            revision=layout.revision,
            architecture=layout.architecture,
            model_type=layout.model_type,
            dtype=layout.dtype,
            parameters=layout.parameters,
            fingerprint=session.fingerprint,
            tied=[list(names) for names in layout.tied],
            fused={
                unit.name: [matrix.name for matrix in unit.matrices]
                for unit in space.units
                if unit.kind == "fused"
            },
            experts={
                matrix.name: matrix.count
                for unit in space.units
                if unit.kind == "experts"
                for matrix in unit.matrices
            },
        ),
        formats=dict(sorted(formats.items())),
        modules=modules,
        excluded=dict(layout.excluded),
        quantizer=PolicyQuantizer(
            method=session.settings.quantizer,
            statistics=PolicyStatistics(
                file=STATISTICS,
                sha256=hashlib.sha256((session.run.path / STATISTICS).read_bytes()).hexdigest(),
            ),
        ),
        calibration=session.corpora["calibration"].describe(),
        budgets=list(budgets),
        achieved=_achieved(space, contender),
        damage=PolicyDamage(
            estimator=estimator,
            predicted=predicted,
            **{
                purpose: PolicyMeasurement(
                    corpus=session.corpora[purpose].describe(),
                    **{key: value for key, value in found.items() if key != "texts"},
                )
                for purpose, found in measured.items()
            },
        ),
        provenance={
            "tool": "bitsearch",
            "contender": contender.name,
            **provenance,
            "seed": session.settings.seed,
            "dtype": session.settings.dtype,
            "versions": {name: _version(name) for name in ("bitsearch", "torch", "transformers")},
        },
    )


def save_front(run: Run, space: Space, budget: Budget, front: Front) -> None:
    """`front.csv` and `front.json`: at most some hundred points, evenly spread in bytes."""
    kept = 0 if budget.linear_only else space.layout.kept_bytes
    parameters = (
        sum(u.parameters for u, linear in zip(space.units, space.linear, strict=True) if linear)
        if budget.linear_only
        else space.layout.parameters
    )
    grid = np.linspace(front.bytes[0], front.bytes[-1], FRONT_POINTS)
    points = sorted({front.within(value) for value in grid})
    rows = [
        {
            "bytes": int(front.bytes[point]) + kept,
            "bpw": 8 * (int(front.bytes[point]) + kept) / parameters,
            "damage": float(front.damage[point]),
        }
        for point in points
    ]
    run.write_json(
        "front.json",
        {
            "scope": "linear" if budget.linear_only else "all",
            "exact": front.exact,
            "points": [
                {**row, "choice": [int(c) for c in front.choice(point)]}
                for row, point in zip(rows, points, strict=True)
            ],
        },
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(run.path / "front.csv", text.getvalue().encode())


def _declared(format: Format) -> PolicyFormat:
    return PolicyFormat(
        kind=format.kind,
        bits=format.bits,
        group_size=format.group_size,
        symmetric=format.symmetric,
    )


def _achieved(space: Space, contender: Contender) -> Achieved:
    assignment = space.assignment(contender.choice)
    total = space.total_bytes(contender.choice)
    chosen = space.bytes[np.arange(len(assignment)), contender.choice]
    linear = sum(
        u.parameters for (u, _), is_in in zip(assignment, space.linear, strict=True) if is_in
    )
    codes = sum(unit.parameters * format.bits for unit, format in assignment)
    return Achieved(
        bytes=total,
        kept_bytes=space.layout.kept_bytes,
        bpw=8 * total / space.layout.parameters,
        linear_bpw=8 * int(chosen[space.linear].sum()) / linear if linear else None,
        nominal_bpw=(codes + 8 * space.layout.kept_bytes) / space.layout.parameters,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
