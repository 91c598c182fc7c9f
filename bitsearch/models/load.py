"""Open a model: its structure from the configuration alone, or with weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput, OutOfResources, UsageError
from bitsearch.models.fingerprint import tensors
from bitsearch.models.gguf import as_plain
from bitsearch.models.layout import find_layout, skeleton
from bitsearch.models.reason import reason
from bitsearch.models.source import (
    Source,
    has_weights,
    read_config,
    require_tokenizer,
    resolve,
    with_weights,
)
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode, without gradients.

    Attributes:
        model: the model of transformers.
        tokenizer: its tokenizer.
        layout: its structure.
        path: the folder or GGUF file it came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: ModelLayout
    path: Path


def open_layout(
    reference: str, *, revision: str | None = None, fuse: bool = True, untie: bool = False
) -> tuple[ModelLayout, PreTrainedConfig, Source]:
    """The structure of a model, without reading (or fetching) its weights.

    Args:
        reference: built-in name, folder, GGUF file, or hub id.
        revision: hub revision.
        fuse: make one unit of matrices that engines fuse at run time.
        untie: give the head a matrix of its own.

    Raises:
        BadInput: the model is missing, broken or of a kind that cannot be searched.
    """
    source = resolve(reference, revision=revision)
    config = read_config(source)
    if untie:
        _untie_config(config)
    layout = find_layout(
        skeleton(config),
        reference=source.reference,
        revision=source.revision,
        dtype=_checkpoint_dtype(config, source),
        fuse=fuse,
    )
    return layout, config, source


def load_model(
    source: Source,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: str | None = None,
    fuse: bool = True,
    untie: bool = False,
) -> LoadedModel:
    """Load a model with its weights, and check that they are complete and finite.

    Args:
        source: from `open_layout` or `resolve`; missing hub weights are fetched.
        dtype: dtype of the parameters, or `auto` for the one of the checkpoint.
        device: where the parameters go.
        attention: attention implementation of transformers, None for its default.
        fuse: as in `open_layout`.
        untie: as in `open_layout`; the head begins as a copy of the embedding.

    Raises:
        BadInput: weights or tokenizer are missing, broken or of another model.
        OutOfResources: the model does not fit in memory.
        UsageError: `dtype` is not the name of a float type.
    """
    source = with_weights(source)
    config = read_config(source)
    skeleton(config)  # what cannot be searched is refused before any weight is read
    require_tokenizer(source)
    if source.gguf is None:
        tensors(source)  # transformers would not name the damaged file
    model = _weights(source, _float_type(dtype), device, attention)
    model.requires_grad_(False)
    if untie:
        untie_head(model)
    _check_finite(source, model)
    tokenizer = _tokenizer(source)
    _check_vocabulary(source, model, tokenizer)
    layout = find_layout(
        model,
        reference=source.reference,
        revision=source.revision,
        dtype=_checkpoint_dtype(config, source),
        fuse=fuse,
    )
    return LoadedModel(model, tokenizer, layout, source.where)


def open_skeleton(
    source: Source, *, untie: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without weights, ready to describe a checkpoint, and its tokenizer.

    Args:
        source: its files, on this machine.
        untie: as in `open_layout`.

    Raises:
        BadInput: configuration or tokenizer are missing, broken or of another model.
    """
    from transformers import GenerationConfig

    config = read_config(source)
    if untie:
        _untie_config(config)
    model = skeleton(config)
    require_tokenizer(source)
    if (source.path / "generation_config.json").is_file():
        opened: Any = model
        opened.generation_config = GenerationConfig.from_pretrained(source.path)
    tokenizer = _tokenizer(source)
    _check_vocabulary(source, model, tokenizer)
    return model, tokenizer


def untie_head(model: PreTrainedModel) -> None:
    """Give a model's head a copy of the embedding, if they are one parameter."""
    from torch import nn

    opened: Any = model
    embedding, head = opened.get_input_embeddings(), opened.get_output_embeddings()
    _untie_config(model.config)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        opened.all_tied_weights_keys = {}


def _untie_config(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False


def _weights(
    source: Source, dtype: torch.dtype | str, device: torch.device | str, attention: str | None
) -> PreTrainedModel:
    """The model, every parameter of it filled from the checkpoint."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from bitsearch.models.packed import load_packed

    options: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        if source.packed:
            return load_packed(source.path, dtype=dtype, device=device, attention=attention)
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Only so that they are reported by name; they are refused below.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        model, info = loaded
        if source.gguf:
            as_plain(model)
        _check_complete(source, info)
        placed: PreTrainedModel = model.eval().to(device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfResources(f"{source.where} does not fit in the memory of {device}") from error
    except (ArithmeticError, AttributeError, ImportError, LookupError, OSError) as error:
        raise _broken(source, error) from error
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        if "can't allocate memory" in str(error):
            raise OutOfResources(f"{source.where} does not fit in memory") from error
        raise _broken(source, error) from error
    return placed


def _broken(source: Source, error: Exception) -> BadInput:
    """The error of a model that transformers cannot load."""
    return BadInput(f"{source.where} cannot be loaded: {reason(error)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers while it loads; its findings are raised as errors instead."""
    from transformers.utils import logging

    chatter: Any = logging
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


def _float_type(dtype: torch.dtype | str) -> torch.dtype | str:
    """A torch float type from its name; `auto` stays."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    if dtype == "auto":
        return dtype
    raise UsageError(f"unknown dtype '{dtype}': give float32, bfloat16, float16 or auto")


def _checkpoint_dtype(config: PreTrainedConfig, source: Source) -> str:
    """Name of the dtype of a checkpoint: as configured, else that of most tensors."""
    if source.gguf:
        return "float32"
    if config.dtype is not None:
        return str(config.dtype).removeprefix("torch.")
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    stored = [dtype for _, dtype in tensors(source).values()] if has_weights(source) else []
    return names.get(max(stored, key=stored.count, default=""), "float32")


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that is not exactly the one of this architecture."""
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise BadInput(
            f"{source.where}: '{name}' has shape {list(stored)}, but the configuration asks for "
            f"{list(expected)} ({len(mismatched)} such tensors)"
        )
    for word, keys in (("lacks", "missing_keys"), ("holds unknown", "unexpected_keys")):
        if names := sorted(info[keys]):
            raise BadInput(
                f"{source.where} {word} weights, e.g. '{names[0]}' ({len(names)} such tensors); "
                "the file belongs to another model or is incomplete"
            )


def _check_finite(source: Source, model: PreTrainedModel) -> None:
    """Refuse NaN and infinite weights, which no quantizer can handle."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(f"{source.where}: '{name}' holds NaN or infinite weights")


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=False, local_files_only=True, **options
            )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadInput(
            f"the tokenizer in {source.where} cannot be read: {reason(error)}"
        ) from error
    return tokenizer


def _check_vocabulary(
    source: Source, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer that makes tokens which the model has no embedding for."""
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.weight.shape[0]
    # Added tokens may lie beyond the embedding (Gemma 3 has one for images), as long as
    # plain text does not produce them.
    needed = [tokenizer.vocab_size - 1, tokenizer.bos_token_id, tokenizer.eos_token_id]
    largest = max(token for token in needed if token is not None)
    if largest >= rows:
        raise BadInput(
            f"the tokenizer in {source.where} does not belong to this model: it makes token "
            f"{largest}, and the embedding has {rows} rows"
        )
