"""A policy's model and weights again, as they were measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.external import open_external
from bitsearch.formats import Format, parse_format
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.layout import find_layout
from bitsearch.models.load import LoadedModel, load_model, open_skeleton
from bitsearch.models.source import Source, with_weights
from bitsearch.models.stored import open_stored
from bitsearch.models.weights import Parameters
from bitsearch.policy import Policy, PolicyFile
from bitsearch.quantizers import load_quantizer, needs_second_moments
from bitsearch.run import check_same, file_sha256
from bitsearch.settings import ExternalFiles
from bitsearch.units import ModelLayout, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bitsearch.models.preparation import Preparation
    from bitsearch.objectives.weights import CandidateWeights

log = logging.getLogger(__name__)


def check_model(policy: Policy, path: Path, source: Source) -> None:
    """Refuse a policy that was made for another model.

    Raises:
        SettingsMismatch: the fingerprints differ.
    """
    found = {key: value for key, value in fingerprint(with_weights(source)).items() if value}
    check_same(policy.model.fingerprint, found, path, "model")


def candidate_weights(
    model: Any,
    policy: Policy,
    path: Path,
    statistics: Path | None,
    *,
    cache_bytes: int,
    stored: Parameters | None = None,
    device: Any = None,
) -> CandidateWeights:
    """The model's weights as the policy's quantizer makes them.

    Args:
        model: the model, holding its reference weights.
        policy: names the quantizer and its calibration statistics.
        path: the policy's file; the statistics lie near it.
        statistics: the statistics, if they do not.
        cache_bytes: most bytes of codes to keep.
        stored: where the weights are, if `model` is a skeleton without any.
        device: where weights are wanted; by default where the model is.

    Raises:
        BadInput: the statistics, or weights of another tool, are missing, damaged or others.
    """
    from bitsearch.objectives.statistics_file import StoredMoments, read_mean_squares
    from bitsearch.objectives.weights import CandidateWeights

    device = device or next(model.parameters()).device
    reference: Parameters = stored or model
    quantizer = load_quantizer(policy.quantizer.method)
    wanted = policy.quantizer.statistics
    if statistics is not None and not statistics.exists():
        raise BadInput(f"no file '{statistics}'; without --statistics it is looked for by {path}")
    file = None if wanted is None else _beside(path, wanted, statistics, "calibration")
    importance = {} if file is None else read_mean_squares(file, device)
    moments = None
    if needs_second_moments(quantizer):
        if file is None:
            raise BadInput(f"{path} names no calibration statistics, which its quantizer needs")
        moments = StoredMoments(file, device)
    files = {
        name: ExternalFiles(found.path, found.sha256)
        for name, found in policy.quantizer.external.items()
    }
    external = open_external(files, model, reference, device)
    return CandidateWeights(reference, quantizer, importance, cache_bytes, moments, external)


def assignment(policy: Policy, layout: ModelLayout) -> list[tuple[Unit, Format]]:
    """The policy's format of every matrix of a model, one single-matrix unit each.

    Raises:
        BadInput: the policy leaves a matrix out.
    """
    found = []
    for unit in layout.units:
        for matrix in unit.matrices:
            if matrix.name not in policy.modules:
                raise BadInput(f"the policy says nothing about {matrix.name}")
            single = Unit(matrix.module, unit.kind, (matrix,), unit.block)
            found.append((single, parse_format(policy.modules[matrix.name].format)))
    return found


def preparation_of(policy: Policy, path: Path, statistics: Path | None) -> Preparation | None:
    """What the model was prepared with before it was measured, if it was.

    Args:
        policy: the policy.
        path: its file; the preparation lies near it.
        statistics: or near the statistics, if they are elsewhere.

    Raises:
        BadInput: the file is missing, damaged or another one.
    """
    made = policy.quantizer.preparation
    if made is None:
        return None
    from bitsearch.models.preparation import load_preparation

    given = None if statistics is None else statistics.parent / made.file
    return load_preparation(_beside(path, made, given, "preparation"))


def load_prepared(
    source: Source, preparation: Preparation | None, *, dtype: str, device: Any
) -> LoadedModel:
    """A model with its weights, prepared as it was when it was measured."""
    untie = preparation is not None and preparation.untied
    loaded = load_model(source, dtype=dtype, device=device, untie=untie)
    if preparation is not None:
        preparation.apply(loaded.model)
    return loaded


@dataclass(frozen=True, slots=True)
class Opened:
    """A prepared model whose weights are read when they are wanted.

    Attributes:
        model: the model; without weights if they are read from its files one by one.
        tokenizer: its tokenizer.
        weights: where they are read, in float32.
        whole: the weights are all in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: Parameters
    whole: bool


def open_prepared(source: Source, preparation: Preparation | None, *, device: Any) -> Opened:
    """A prepared model that takes the memory of a parameter, where its files allow that."""
    from bitsearch.models.preparation import Prepared

    untie = preparation is not None and preparation.untied
    if source.gguf is None and not source.packed:
        model, tokenizer = open_skeleton(source, untie=untie)
        copies: dict[str, str] = {}
        if untie:
            tied = find_layout(open_skeleton(source)[0], reference="").tied
            copies = {other: first for first, *others in tied for other in others}
        stored = open_stored(source, model, device, copies)
        if stored is not None:
            prepared = Prepared(stored, preparation) if preparation else stored
            return Opened(model, tokenizer, prepared, False)
    log.info("%s cannot be read one tensor after another: loading it as a whole", source.where)
    loaded = load_prepared(source, preparation, dtype="float32", device=device)
    return Opened(loaded.model, loaded.tokenizer, loaded.model, True)


def _beside(path: Path, wanted: PolicyFile, given: Path | None, what: str) -> Path:
    """A file that a policy names, with the hash that it gives."""
    # policies/ lies below the folder that holds the files
    places = [path.parent / wanted.file, path.parent.parent / wanted.file]
    for place in [given, *places] if given else places:
        try:
            found = file_sha256(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BadInput(f"{place} cannot be read: {error.strerror}") from error
        if found != wanted.sha256:
            raise BadInput(f"{place} is not the {what} that {path} was made with")
        return place
    raise BadInput(
        f"{path} was made with the {what} '{wanted.file}', which is not beside it; "
        "give the statistics of its run with --statistics"
    )
