"""The policy that a search leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bitsearch.contenders import Contender
from bitsearch.formats import Format
from bitsearch.policy import (
    Achieved,
    Policy,
    PolicyDamage,
    PolicyExternal,
    PolicyFile,
    PolicyFormat,
    PolicyLatency,
    PolicyMeasurement,
    PolicyModel,
    PolicyModule,
    PolicyPreparation,
    PolicyQuantizer,
    PolicyTarget,
)
from bitsearch.run import PREPARATION, STATISTICS
from bitsearch.session import Session
from bitsearch.space import LINEAR_KINDS, Space
from bitsearch.units import Matrix, ModelLayout, Unit

Assignment = Sequence[tuple[Unit, Sequence[tuple[Matrix, Format]]]]


def make_policy(
    session: Session,
    contender: Contender,
    estimator: str,
    budgets: Sequence[str],
    predicted: float,
    measured: dict[str, dict[str, Any]],
    provenance: dict[str, Any],
    latency: list[PolicyLatency] | None = None,
) -> Policy:
    """The policy file's content; free of dates, so that a resumed run writes the same."""
    space, layout = session.space, session.space.layout
    assignment: Assignment = [
        (unit, [(matrix, format) for matrix in unit.matrices])
        for unit, format in space.assignment(contender.choice)
    ]
    formats = {format.name: declared(format) for _, pairs in assignment for _, format in pairs}
    return Policy(
        model=described_model(layout, session.fingerprint),
        formats=dict(sorted(formats.items())),
        modules=described_modules(assignment),
        excluded=dict(layout.excluded),
        quantizer=PolicyQuantizer(
            method=session.settings.quantizer,
            statistics=PolicyFile(file=STATISTICS, sha256=session.statistics_sha256),
            preparation=_preparation(session),
            external={
                name: PolicyExternal(path=files.path, sha256=files.sha256)
                for name, files in session.settings.external.items()
                if name in formats
            },
        ),
        calibration=session.corpora["calibration"].describe(),
        budgets=list(budgets),
        achieved=achieved(layout, assignment),
        target=_target(space, contender),
        latency=latency,
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


def _preparation(session: Session) -> PolicyPreparation | None:
    method, sha256 = session.settings.prepare, session.preparation_sha256
    if method is None or sha256 is None:
        return None
    return PolicyPreparation(method=method, file=PREPARATION, sha256=sha256)


def described_model(layout: ModelLayout, hashes: dict[str, str]) -> PolicyModel:
    """What a policy says of its model."""
    return PolicyModel(
        reference=layout.reference,
        revision=layout.revision,
        architecture=layout.architecture,
        model_type=layout.model_type,
        dtype=layout.dtype,
        parameters=layout.parameters,
        fingerprint=hashes,
        tied=[list(names) for names in layout.tied],
        fused={
            unit.name: [matrix.name for matrix in unit.matrices]
            for unit in layout.units
            if unit.kind == "fused"
        },
        experts={
            matrix.name: matrix.count
            for unit in layout.units
            if unit.kind == "experts"
            for matrix in unit.matrices
        },
    )


def described_modules(assignment: Assignment) -> dict[str, PolicyModule]:
    """The decision for every tensor."""
    return {
        matrix.name: PolicyModule(
            format=format.name,
            unit=unit.name,
            role=matrix.role,
            block=unit.block,
            shape=(matrix.out_features, matrix.in_features),
            count=matrix.count,
            bytes=matrix.count * format.bytes(matrix.out_features, matrix.in_features),
        )
        for unit, pairs in assignment
        for matrix, format in pairs
    }


def declared(format: Format) -> PolicyFormat:
    """A format as a policy declares it."""
    return PolicyFormat(
        kind=format.kind,
        bits=format.bits,
        group_size=format.group_size,
        symmetric=format.symmetric,
    )


def achieved(layout: ModelLayout, assignment: Assignment) -> Achieved:
    """What a policy weighs in bitsearch's own packed layout."""
    total, codes = layout.kept_bytes, 8 * layout.kept_bytes
    linear_bytes = linear = 0
    for unit, pairs in assignment:
        for matrix, format in pairs:
            size = matrix.count * format.bytes(matrix.out_features, matrix.in_features)
            total += size
            codes += matrix.parameters * format.bits
            if unit.kind in LINEAR_KINDS:
                linear_bytes += size
                linear += matrix.parameters
    return Achieved(
        bytes=total,
        kept_bytes=layout.kept_bytes,
        bpw=8 * total / layout.parameters,
        linear_bpw=8 * linear_bytes / linear if linear else None,
        nominal_bpw=codes / layout.parameters,
    )


def _target(space: Space, contender: Contender) -> PolicyTarget | None:
    """The engine that was searched for, if its files store other bytes or it runs not all."""
    target = space.target
    if not target.runs:
        return None
    size = space.total_bytes(contender.choice)
    return PolicyTarget(
        name=target.name,
        title=target.title,
        bytes=size,
        bpw=8 * size / space.layout.parameters,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
