"""From what the user typed to files on this machine: folder, GGUF, hub, built-in."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.models.builtin import BUILTINS, builtin_folder
from bitsearch.models.gguf import check_magic
from bitsearch.models.reason import reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\S+))?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
PACKED = "packed.safetensors"
_DESCRIPTION_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_LANGUAGE_MODEL = re.compile("CausalLM|LMHead|ConditionalGeneration")


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this machine.

    Attributes:
        reference: what the user asked for.
        revision: commit of a hub model, None for anything else.
        path: the folder that holds the files.
        gguf: name of the GGUF file in the folder, None for safetensors.
    """

    reference: str
    revision: str | None
    path: Path
    gguf: str | None = None

    @property
    def where(self) -> Path:
        """The path to name in messages: the GGUF file, or the folder."""
        return self.path / self.gguf if self.gguf else self.path

    @property
    def packed(self) -> bool:
        """Whether it is a packed checkpoint, with weights that only bitsearch reads."""
        return self.gguf is None and (self.path / PACKED).is_file()


def resolve(reference: str, *, revision: str | None = None) -> Source:
    """Find the files of a model; of a hub model, fetch all but the weights.

    A built-in name wins over a folder of the same name (write `./tiny` for that);
    a folder or file wins over a hub id.

    Args:
        reference: built-in name, folder, GGUF file, or hub id `org/name[@revision]`.
        revision: hub revision, unless the reference names one.

    Raises:
        BadInput: nothing is there, or it is not a model that can be opened.
    """
    if reference in BUILTINS:
        source = Source(reference, None, builtin_folder(reference))
    elif (path := Path(reference).expanduser()).exists():
        source = _local(reference, path)
    elif (match := _HUB_ID.fullmatch(reference)) and not reference.endswith(".gguf"):
        return _hub(reference, match["name"], match["revision"] or revision)
    else:
        close = get_close_matches(reference, BUILTINS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise BadInput(
            f"no model '{reference}'{hint or ': no such folder or file'}; built-in models: "
            f"{', '.join(BUILTINS)}; or give a folder, a .gguf file or a hub id org/name"
        )
    if revision is not None:
        raise BadInput(f"'{reference}' is not a hub model and has no revision '{revision}'")
    return source


def _local(reference: str, path: Path) -> Source:
    """A folder or a GGUF file."""
    if path.is_file():
        if path.suffix == ".gguf":
            check_magic(path)
            return Source(reference, None, path.parent, path.name)
        raise BadInput(f"{path} is not a model folder or a .gguf file")
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; give the file, e.g. {path / ggufs[0]}" if ggufs else ""
        raise BadInput(f"{path} holds no config.json{hint}")
    _refuse_pickles(path)
    _refuse_adapter(path)
    return Source(reference, None, path)


def with_weights(source: Source) -> Source:
    """The same model, with the weights on this machine.

    Raises:
        BadInput: they cannot be fetched.
    """
    if source.revision is None:
        return source
    name = source.reference.partition("@")[0]
    return _hub(source.reference, name, source.revision, weights=True)


def _hub(reference: str, name: str, revision: str | None, *, weights: bool = False) -> Source:
    """A hub model; with HF_HUB_OFFLINE set only what is in the hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_DESCRIPTION_FILES, *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BadInput(f"hub model '{name}' asks for a licence agreement and a login") from error
    except RevisionNotFoundError as error:
        raise BadInput(f"hub model '{name}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise BadInput(
            f"no model '{name}': neither a folder here nor a hub model you may read"
        ) from error
    except LocalEntryNotFoundError as error:
        raise BadInput(
            f"hub model '{name}' is not in the local hub cache and the hub cannot be reached; "
            "go online (unset HF_HUB_OFFLINE) or give a folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise BadInput(f"hub model '{name}' cannot be fetched: {reason(error)}") from error
    if not (folder / "config.json").is_file():
        raise BadInput(f"hub model '{name}' holds no config.json")
    _refuse_adapter(folder)
    return Source(reference, folder.name, folder)


def weight_files(source: Source) -> tuple[Path, ...]:
    """The files that hold the weights, sorted by name.

    Raises:
        BadInput: there are none, only pickled ones, or a shard is missing, pickled or elsewhere.
    """
    if source.gguf:
        return (source.where,)
    index = source.path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(source.path / shard for shard in _shards(index))
        if missing := [file.name for file in files if not file.is_file()]:
            raise BadInput(f"{source.path} lacks {len(missing)} weight file(s): {missing[0]}, …")
    else:
        files = sorted(source.path.glob("*.safetensors"))
        if not files:
            _refuse_pickles(source.path)
    if not files:
        raise BadInput(f"{source.path} holds no .safetensors weights (pickled ones are not opened)")
    return tuple(files)


def _shards(index: Path) -> set[str]:
    """Names of the files that an index lists; others than safetensors would be unpickled later."""
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise BadInput(f"{index} has no weight_map; fetch it again")
    for shard in listed.values():
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or not shard.endswith(".safetensors"):
            raise BadInput(f"{index} lists '{shard}', which is no .safetensors file beside it")
    return set(listed.values())


def has_weights(source: Source) -> bool:
    """Whether weights are on this machine, and not the configuration alone."""
    return source.gguf is not None or any(source.path.glob("*.safetensors"))


def _refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickles, which can run any code when read."""
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors where you trust them: load the folder with transformers "
            "and call save_pretrained on the model and the tokenizer"
        )


def _refuse_adapter(folder: Path) -> None:
    """Refuse a model with an adapter, which is left out or unpickled as PEFT is here or not."""
    if (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"{folder} holds an adapter (adapter_config.json); merge it into the model first: "
            "PEFT's merge_and_unload, then save_pretrained"
        )


def require_tokenizer(source: Source) -> None:
    """Check that tokenizer files exist; transformers would make up an empty tokenizer.

    Raises:
        BadInput: there are none.
    """
    if source.gguf or any(any(source.path.glob(name)) for name in _TOKENIZER_FILES):
        return
    raise BadInput(
        f"{source.path} holds no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}); "
        "copy the tokenizer files of the original model there"
    )


def read_config(source: Source) -> PreTrainedConfig:
    """The configuration of a model, without running code that came with it.

    Raises:
        BadInput: it cannot be read, or is not one of an unquantized language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    where = source.where if source.gguf else source.path / "config.json"
    if not source.gguf:
        _check_config(where, _read_json(where))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.path,
            trust_remote_code=False,
            local_files_only=True,
            **({"gguf_file": source.gguf} if source.gguf else {}),
        )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        StrictDataclassError,
        struct.error,
        TypeError,
        ValueError,
    ) as error:
        raise BadInput(
            f"{where} cannot be read as a model configuration: {reason(error)}"
        ) from error
    return config


def _check_config(where: Path, config: dict[str, Any]) -> None:
    """Refuse what transformers would open wrongly, or only with code from the model."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    architectures = config.get("architectures")
    architectures = architectures if isinstance(architectures, Sequence) else []
    if not isinstance(model_type, str):
        raise BadInput(f"{where} names no model_type")
    if model_type not in CONFIG_MAPPING:
        code = " (it comes with its own Python code, which is never run)"
        raise BadInput(
            f"{where}: model type '{model_type}' is unknown to transformers"
            f"{code if 'auto_map' in config else ''}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise BadInput(f"{where}: already quantized ({method}); give the unquantized model")
    if architectures and not any(_LANGUAGE_MODEL.search(str(name)) for name in architectures):
        raise BadInput(f"{where}: {architectures[0]} is not a causal language model")


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} is not a JSON object")
    return content
