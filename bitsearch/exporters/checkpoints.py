"""Folders that transformers and the engines open: safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput, OutOfResources
from bitsearch.exporters.base import Checkpoint, Translation
from bitsearch.models.packed import persistent_buffers

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.codec import Encoded

Packed = Callable[[str, Any], dict[str, "Tensor"]]


def save_checkpoint(
    checkpoint: Checkpoint,
    translation: Translation,
    packed: Packed,
    quantization_config: Mapping[str, Any],
    folder: Path,
    header: Mapping[str, str] | None = None,
    encoded: Mapping[str, Encoded] | None = None,
) -> dict[str, int]:
    """Write every tensor of a model, its configuration and its tokenizer.

    Args:
        checkpoint: the weights.
        translation: what the target holds.
        packed: (module name, encoded matrix) -> stored tensors by name.
        quantization_config: goes into config.json.
        folder: where to.
        header: more of the metadata of each file.
        encoded: matrices that are not quantized one by one, by tensor name.

    Returns:
        Bytes of the tensors in each file, read back.
    """
    import torch
    from huggingface_hub import save_torch_state_dict

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    tensors: dict[str, Tensor] = {}
    for done, (name, matrix) in enumerate(checkpoint.matrices.items()):
        checkpoint.progress("quantizing", done, len(checkpoint.matrices))
        format = translation.formats[name]
        if format.exact:
            value = checkpoint.loaded.model.get_parameter(name).detach()
            tensors[name] = value.to("cpu", types[format.kind]).contiguous()
        elif encoded is not None and name in encoded:
            tensors |= packed(matrix.module, encoded[name])
        else:
            (quantized,) = checkpoint.weights.quantized(matrix, format)
            tensors |= packed(matrix.module, quantized)
    checkpoint.progress("quantizing", len(checkpoint.matrices), len(checkpoint.matrices))
    for name in checkpoint.loaded.layout.kept:
        tensors[name] = checkpoint.plain(name)
    buffers = persistent_buffers(checkpoint.loaded.model)
    tensors |= {name: buffer.contiguous().cpu() for name, buffer in buffers.items()}
    try:
        save_torch_state_dict(tensors, folder, metadata={"format": "pt", **(header or {})})
    except RuntimeError as error:  # safetensors' own errors are not OSErrors
        raise OutOfResources(f"cannot write {folder}: {error}") from error
    save_description(checkpoint, quantization_config, folder)
    return {file.name: tensor_bytes(file) for file in sorted(folder.glob("*.safetensors"))}


def save_description(
    checkpoint: Checkpoint, quantization_config: Mapping[str, Any], folder: Path
) -> None:
    """The configuration, with how it is quantized, and the tokenizer."""
    model: Any = checkpoint.loaded.model
    config = model.config.to_dict()
    config["dtype"] = checkpoint.dtype
    config["quantization_config"] = dict(quantization_config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    checkpoint.loaded.tokenizer.save_pretrained(folder)


def tensor_bytes(file: Path) -> int:
    """What a safetensors file holds after its header."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header


def read_json(path: Path, alone: str, key: str) -> dict[str, Any]:
    """A tool's configuration: a file of its own, or a part of config.json.

    Args:
        path: a file; or a folder with `alone` or config.json in it.
        alone: the name of the file that holds nothing else.
        key: the part of config.json.

    Raises:
        BadInput: there is none.
    """
    if path.is_dir():
        path = next((p for p in (path / alone, path / "config.json") if p.is_file()), path / alone)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    found = content.get(key, content) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no {key}")
    return found
