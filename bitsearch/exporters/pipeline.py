"""`bitsearch export` and `bitsearch import`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitsearch.appearing import appearing, saving
from bitsearch.errors import BadInput, UsageError
from bitsearch.exporters import exporter_names, load_exporter
from bitsearch.exporters.base import (
    LOSSES,
    Checkpoint,
    Exported,
    Exporter,
    Loss,
    Progress,
    Reading,
    Translation,
)
from bitsearch.formats import BF16
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.load import open_layout, quiet
from bitsearch.models.packed import POLICY
from bitsearch.models.source import with_weights
from bitsearch.policy import Policy, PolicyDamage, PolicyQuantizer, load_policy, save_policy
from bitsearch.record import Assignment, achieved, declared, described_model, described_modules
from bitsearch.restore import candidate_weights, check_model, load_prepared, preparation_of
from bitsearch.run import atomic_write
from bitsearch.session import pick_device
from bitsearch.targets import Kind, Target, load_target, target_names
from bitsearch.units import ModelLayout

RECORD = "bitsearch.json"
_SHOWN = 3
_DTYPES = ("bfloat16", "float16", "float32")


def export_policy(
    policy_path: Path,
    target: str,
    out: Path,
    *,
    model: str | None = None,
    allowed: Collection[str] = (),
    dtype: str | None = None,
    statistics: Path | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write a policy as another tool reads it; with a model, its quantized weights too.

    Args:
        policy_path: the policy file.
        target: name of an exporter; or of a target, whose exporter is used, and whose
            engine must run every unit.
        out: folder to make; it appears when it is complete.
        model: the model that the policy was made for; None writes the configuration alone.
        allowed: codes of the losses that are accepted.
        dtype: what engines run in by default: `bfloat16`, `float16` or `float32`; by
            default float16 if the model is, else bfloat16.
        statistics: calibration statistics; by default the file that the policy names.
        device: where to quantize.
        force: replace an earlier export.
        progress: called with stage, done, total.

    Raises:
        UsageError: no such target, no such loss, or a loss that was not allowed.
        BadInput: the target cannot hold a unit, or model and policy do not fit.
    """
    if unknown := sorted(set(allowed) - LOSSES.keys()):
        raise UsageError(f"unknown loss '{unknown[0]}'; known: {', '.join(LOSSES)}")
    if dtype not in (None, *_DTYPES):
        raise UsageError(f"--dtype {dtype}: write {', '.join(_DTYPES)}")
    exporter, profile = _exporter(target)
    policy = load_policy(policy_path)
    translation = exporter.translate(policy)
    if profile is not None:
        unserved = tuple(_unserved(policy, translation, profile))
        translation = replace(translation, losses=translation.losses + unserved)
    made = policy.quantizer.preparation
    if made is not None and model is None:
        loss = Loss("PREPARATION_DROPPED", policy.model.reference, made.method, "none")
        translation = replace(translation, losses=(*translation.losses, loss))
    _refuse(translation.losses, allowed, target)
    if model is None and exporter.needs_weights:
        raise UsageError(f"{target} needs the weights: give --model {policy.model.reference}")
    if model is not None and not exporter.writes_weights:
        raise UsageError(f"{target} takes a configuration and no weights: leave --model away")
    source = None
    if model is not None:
        _, _, source = open_layout(model)
        source = with_weights(source)
        check_model(policy, policy_path, source)
    if dtype == "float32" and translation.bytes is not None:
        translation = replace(translation, bytes=translation.bytes + policy.achieved.kept_bytes)
    size = 0 if source is None else translation.bytes or 0
    with appearing(out, size, force, (POLICY, RECORD)) as folder:
        checkpoint = None
        if source is not None:
            preparation = preparation_of(policy, policy_path, statistics)
            loaded = load_prepared(source, preparation, dtype="float32", device=pick_device(device))
            weights = candidate_weights(
                loaded.model, policy, policy_path, statistics, cache_bytes=0
            )
            own = "float16" if loaded.layout.dtype == "float16" else "bfloat16"
            checkpoint = Checkpoint(loaded, weights, source.path, dtype or own, progress)
        with saving(out), quiet():
            stored = exporter.write(policy, translation, folder, checkpoint)
            (folder / POLICY).write_bytes(policy_path.read_bytes())
        exported = Exported(
            files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            losses=translation.losses,
            predicted_bytes=translation.bytes,
            tensor_bytes=sum(stored.values()) if stored else None,
        )
        found = {"target": target, "bitsearch": version("bitsearch"), **exported.describe()}
        with saving(out):
            (folder / RECORD).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {"policy": str(policy_path), "model": model, "out": str(out), **found}


def import_policy(
    path: Path, target: str, model: str, out: Path, *, force: bool = False
) -> dict[str, Any]:
    """Make a policy of another tool's mixed configuration, and write it.

    Args:
        path: the tool's file, or the folder that holds it.
        target: name of an exporter that can also read.
        model: the unquantized model.
        out: policy file to write.
        force: replace a file.

    Raises:
        UsageError: no such target, or its files cannot be read.
        BadInput: the file does not belong to the model, or says what no policy can hold.
    """
    exporter = load_exporter(target)
    if exporter.read is None:
        able = [name for name in exporter_names() if load_exporter(name).read]
        raise UsageError(f"no policy can be imported from {target}; from: {', '.join(able)}")
    if out.exists() and not force:
        raise BadInput(f"{out} exists already; --force replaces it, or choose another --out")
    layout, _, source = open_layout(model)
    try:
        reading = exporter.read(path, layout)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    known = {matrix.name for unit in layout.units for matrix in unit.matrices}
    if strange := sorted(reading.formats.keys() - known):
        raise BadInput(f"{path} quantizes {strange[0]}, which {model} does not have or keeps")
    hashes = {key: value for key, value in fingerprint(with_weights(source)).items() if value}
    policy = policy_of(layout, hashes, reading, {"imported_from": target, "file": path.name})
    atomic_write(out, save_policy(policy).encode())
    return {
        "model": model,
        "from": target,
        "policy": str(out),
        "bytes": policy.achieved.bytes,
        "bpw": policy.achieved.bpw,
        "notes": list(reading.notes),
    }


def policy_of(
    layout: ModelLayout, hashes: dict[str, str], reading: Reading, provenance: dict[str, Any]
) -> Policy:
    """The policy with these formats; what they leave out stays at 16 bits.

    Units are those of `layout`; a fused set whose members differ is still one unit.
    """
    assignment: Assignment = [
        (unit, [(matrix, reading.formats.get(matrix.name, BF16)) for matrix in unit.matrices])
        for unit in layout.units
    ]
    formats = {format.name: declared(format) for _, pairs in assignment for _, format in pairs}
    return Policy(
        model=described_model(layout, hashes),
        formats=dict(sorted(formats.items())),
        modules=described_modules(assignment),
        excluded=dict(layout.excluded),
        quantizer=PolicyQuantizer(method=reading.method),
        calibration=None,
        budgets=[],
        achieved=achieved(layout, assignment),
        damage=PolicyDamage(estimator="none", predicted=None),
        provenance={"tool": "bitsearch", **provenance},
    )


def _exporter(name: str) -> tuple[Exporter, Target | None]:
    """The exporter of a name, or that of a target; and the target of the name."""
    if name not in exporter_names() and name in target_names():
        target = load_target(name)
        if target.exporter is None:
            raise UsageError(f"{name} has no files of its own; see `bitsearch list exporters`")
        return load_exporter(target.exporter), target
    return load_exporter(name), load_target(name) if name in target_names() else None


def _unserved(policy: Policy, translation: Translation, target: Target) -> Iterator[Loss]:
    """What the engine of a target has no kernel for."""
    tied = {name for names in policy.model.tied for name in names}
    for tensor, module in policy.modules.items():
        kind: Kind = "experts" if tensor in policy.model.experts else "linear"
        if module.role == "embedding":
            kind = "tied" if tensor in tied else "embedding"
        elif module.role == "head":
            kind = "head"
        format = translation.formats[tensor]
        if reason := target.refusal(kind, *module.shape, format):
            yield Loss("WIDTH_UNSERVED", tensor, format.name, f"nothing: {reason}")


def _refuse(losses: Collection[Loss], allowed: Collection[str], target: str) -> None:
    """Name the losses that nobody allowed."""
    refused = [loss for loss in losses if loss.code not in allowed]
    if not refused:
        return
    shown = "; ".join(
        f"{loss.module}: {loss.from_} becomes {loss.to} ({loss.code})" for loss in refused[:_SHOWN]
    )
    more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    codes = ",".join(sorted({loss.code for loss in refused}))
    raise UsageError(
        f"{target} cannot hold this policy as it is: {shown}{more}; accept with "
        f"--allow-loss {codes}, or search with --target"
    )
