"""A checkpoint's parameters, each read from its file when it is asked for.

Possible where the files hold the parameters of the model one by one, as they do for
dense models. Experts that are stored apart and stacked by transformers, and what a GGUF
file holds, have to be opened as a whole (`bitsearch.models.load`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.models.reason import reason
from bitsearch.models.source import Source, weight_files
from bitsearch.models.weights import all_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredParameters:
    """Parameters in safetensors files.

    Attributes:
        places: file and key by parameter name.
        device: where they are wanted.
    """

    places: Mapping[str, tuple[Path, str]]
    device: torch.device | str

    def get_parameter(self, target: str) -> Tensor:
        """A float32 copy of a parameter.

        Raises:
            AttributeError: there is no such parameter.
            BadInput: the file is damaged, or holds NaN or infinite weights.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        if target not in self.places:
            raise AttributeError(f"no parameter '{target}'")
        file, key = self.places[target]
        try:
            # Opened anew each time: what was read stays in memory as long as the file is open.
            with safe_open(file, framework="pt") as stored:
                read = stored.get_tensor(key).to(self.device, torch.float32, copy=True)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file} is damaged: {reason(error)}; fetch it again") from error
        if not all_finite(read):
            raise BadInput(f"{file}: '{key}' holds NaN or infinite weights")
        found: Tensor = read
        return found


def open_stored(
    source: Source,
    model: PreTrainedModel,
    device: torch.device | str,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> StoredParameters | None:
    """The parameters of a checkpoint, if they can be read one by one.

    Args:
        source: the files, on this machine.
        model: its skeleton, without weights.
        device: where the parameters are wanted.
        copies: parameters that are not stored, and the ones that they begin as.

    Returns:
        None if the files do not hold exactly the parameters of the skeleton: the model
        must be loaded as a whole, which also says what is wrong, if anything is.

    Raises:
        BadInput: a file is missing or damaged.
    """
    if source.gguf is not None or source.packed:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping

    stored = listed_tensors(source)
    changes = get_model_conversion_mapping(model)
    if any(change.rename_source_key(key)[1] is not None for change in changes for key in stored):
        return None
    wanted = dict(model.named_parameters())
    state = set(model.state_dict())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    places: dict[str, tuple[Path, str]] = {}
    for name, parameter in wanted.items():
        key = copies.get(name, name)
        key = key if key in stored else key.removeprefix(prefix)
        file, shape, dtype = stored.get(key, (Path(), [], ""))
        if shape != list(parameter.shape) or dtype not in _FLOATS:
            return None
        places[name] = (file, key)
    used = {key for _, key in places.values()}
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = [
        key
        for key in stored.keys() - used
        if key not in every and not any(re.search(pattern, key) for pattern in ignored)
    ]
    if unknown or state - every:  # buffers that are stored
        return None
    return StoredParameters(places, device)


def listed_tensors(source: Source) -> dict[str, tuple[Path, list[int], str]]:
    """File, shape and type of every stored tensor."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in weight_files(source):
        try:
            with safe_open(file, framework="numpy") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a mapping
                    view = stored.get_slice(key)
                    found[key] = (file, list(view.get_shape()), str(view.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file} is damaged: {error}; fetch it again") from error
    return found
