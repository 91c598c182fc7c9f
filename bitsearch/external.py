"""Checkpoints of other tools as candidates: `--external int4-g64=FOLDER`.

The weights of a format are then those of the folder or GGUF file, by name; they are read
when they are needed. A folder holds values, or codes as compressed-tensors, GPTQ or
AutoRound pack them. What no policy decides (norms, biases) must be as in the model: a
tool that changed that too, such as AWQ with its scales in the norms, made another model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format, parse_format
from bitsearch.models.layout import find_layout
from bitsearch.models.load import load_model
from bitsearch.models.source import Source, resolve, weight_files, with_weights
from bitsearch.models.stored import open_stored
from bitsearch.models.unpacked import open_unpacked
from bitsearch.models.weights import Parameters
from bitsearch.run import check_same, file_sha256
from bitsearch.settings import ExternalFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDED = 2.0**-8  # of the largest: what is kept may be stored at 16 bits


def described(paths: Mapping[str, str]) -> dict[str, ExternalFiles]:
    """The files behind each format's path, with their hashes.

    Raises:
        UsageError: a format is unknown, or keeps weights as they are.
        BadInput: there is no checkpoint at a path.
    """
    found = {}
    for name, path in paths.items():
        format = parse_format(name)
        if format.exact:
            raise UsageError(f"--external {name}={path}: {name} keeps weights as they are")
        found[format.name] = ExternalFiles(path, _hashes(with_weights(resolve(path))))
    return found


def open_external(
    external: Mapping[str, ExternalFiles],
    model: PreTrainedModel,
    reference: Parameters,
    device: Any,
) -> dict[Format, Parameters]:
    """Where the weights of each format are read.

    Args:
        external: what was described.
        model: the model, or its skeleton.
        reference: its weights.
        device: where weights are wanted.

    Raises:
        BadInput: the files have changed, or do not belong to the model.
    """
    found: dict[Format, Parameters] = {}
    kept = find_layout(model, reference="").kept if external else ()
    for name, files in external.items():
        source = with_weights(resolve(files.path))
        check_same(files.sha256, _hashes(source), source.where, "sha256")
        parameters: Parameters | None = open_unpacked(source, model, device)
        parameters = parameters or open_stored(source, model, device)
        if parameters is None:
            parameters = load_model(source, dtype="float32", device=device).model
        _check(parameters, reference, kept, source.where)
        found[parse_format(name)] = parameters
    return found


def _hashes(source: Source) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in weight_files(source)}


def _check(found: Parameters, reference: Parameters, kept: Iterable[str], where: Path) -> None:
    """Refuse what differs from the model in more than its matrices."""
    for name in kept:
        try:
            ours = reference.get_parameter(name).detach()
            theirs = found.get_parameter(name).detach()
        except AttributeError as error:
            raise BadInput(f"{where} holds no '{name}': it is of another model") from error
        if ours.shape != theirs.shape:
            raise BadInput(f"{where}: '{name}' is {list(theirs.shape)}, not {list(ours.shape)}")
        if float((theirs.to(ours) - ours).abs().max()) > _ROUNDED * float(ours.abs().max()):
            raise BadInput(
                f"{where}: '{name}' is not that of the model: the tool changed more than the "
                "weights that it quantized"
            )
