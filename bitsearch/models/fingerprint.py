"""What identifies a model: hashes of its configuration and of its tensors' shapes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.models.gguf import gguf_tensors
from bitsearch.models.source import Source, has_weights, read_config, weight_files

# Says who wrote the configuration, not what the model is.
_PROVENANCE = ("_name_or_path", "transformers_version")


def fingerprint(source: Source) -> dict[str, str | None]:
    """Hashes that tell whether two models have the same structure.

    Returns:
        `config_sha256`: of the configuration, whatever its layout in the file.
        `tensors_sha256`: of the sorted (name, shape, dtype) of all tensors, read
        from the headers; None where only the configuration is on this machine.

    Raises:
        BadInput: a file is missing or broken.
    """
    config = read_config(source).to_dict()
    settings = {key: value for key, value in config.items() if key not in _PROVENANCE}
    listed = None
    if has_weights(source):
        listed = [[name, *found] for name, found in sorted(tensors(source).items())]
    return {
        "config_sha256": _sha256(settings),
        "tensors_sha256": None if listed is None else _sha256(listed),
    }


def tensors(source: Source) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor by name, from the headers of the weight files.

    Raises:
        BadInput: a file is missing, damaged or cut off.
    """
    if source.gguf:
        return gguf_tensors(source.where)
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[list[int], str]] = {}
    for file in weight_files(source):
        try:
            with safe_open(file, framework="numpy") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    view = stored.get_slice(name)
                    found[name] = (list(view.get_shape()), str(view.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file} is damaged: {error}; fetch it again") from error
    return found


def _sha256(content: Any) -> str:
    """SHA-256 of a JSON value in one fixed spelling."""
    spelled = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(spelled.encode()).hexdigest()
