"""GGUF files: opened through transformers, which dequantizes every tensor."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_magic(file: Path) -> None:
    """Look at the first bytes of a file.

    Raises:
        BadInput: it is no GGUF file, whatever its name.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BadInput(f"{file} is not a GGUF file")


def gguf_tensors(file: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and ggml type of every tensor of a GGUF file, by name.

    Raises:
        BadInput: the file is damaged or cut off.
    """
    from gguf import GGUFReader

    try:
        listed = GGUFReader(file).tensors
    except (LookupError, OSError, OverflowError, struct.error, TypeError, ValueError) as error:
        raise BadInput(f"{file} is damaged: {error}; fetch it again") from error
    return {entry.name: (entry.shape.tolist(), entry.tensor_type.name) for entry in listed}


def as_plain(model: PreTrainedModel) -> None:
    """Make a model that was read from a GGUF file an ordinary one.

    transformers keeps calling it quantized, and refuses to save it, although its
    weights are plain floats by then.
    """
    loaded: Any = model
    loaded.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
