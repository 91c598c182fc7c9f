"""The policy that a search leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

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
from bitsearch.run import STATISTICS
from bitsearch.session import Session
from bitsearch.space import Space


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
                sha256=session.statistics_sha256,
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
