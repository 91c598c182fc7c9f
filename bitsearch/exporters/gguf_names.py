"""Which tensors of a GGUF file a parameter becomes, and how its rows lie there.

Names come from the `gguf` library's own map. llama.cpp rotates the q and k rows of the
Llama family in pairs of neighbours, transformers in halves of a head: those rows are
reordered. Stacked gate and up projections of experts become two tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gguf

from bitsearch.errors import BadInput


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp holds the models of one transformers model type.

    Attributes:
        arch: llama.cpp's architecture, as a member of `gguf.MODEL_ARCH`.
        paired: rotary embeddings turn neighbouring rows of q and k.
        norm_offset: added to the weights of norms; transformers adds it at run time.
    """

    arch: str
    paired: bool = False
    norm_offset: float = 0.0


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LLAMA", paired=True),
    "mistral": Family("LLAMA", paired=True),
    "mixtral": Family("LLAMA", paired=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "qwen3_moe": Family("QWEN3MOE"),
    "gemma3_text": Family("GEMMA3", norm_offset=1.0),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a GGUF file.

    Attributes:
        name: its name there, `blk.0.attn_q.weight`.
        half: 0 or 1 if it is the first or second half of the parameter's rows.
    """

    name: str
    half: int | None = None


def family_of(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        BadInput: it is not one that has been checked.
    """
    if model_type not in FAMILIES:
        raise BadInput(
            f"model type '{model_type}' has no map to llama.cpp's tensors here; "
            f"known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def parts_of(names: Iterable[str], model_type: str, blocks: int) -> dict[str, tuple[Part, ...]]:
    """The GGUF tensors of each parameter, by its full name.

    Args:
        names: parameter names as transformers gives them.
        model_type: transformers' model type.
        blocks: number of decoder blocks.

    Raises:
        BadInput: the family is unknown, or llama.cpp has no tensor for a parameter.
    """
    arch = gguf.MODEL_ARCH[family_of(model_type).arch]
    known = gguf.get_tensor_name_map(arch, blocks)

    def part(name: str, half: int | None = None) -> Part:
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise BadInput(f"llama.cpp's {arch.name.lower()} has no tensor for {name}")
        return Part(theirs, half)

    found = {}
    for name in names:
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            halves = (f"{stem}gate_proj.weight", f"{stem}up_proj.weight")
            found[name] = tuple(part(leaf, half) for half, leaf in enumerate(halves))
        else:
            # Stacked experts are parameters without a module of their own.
            whole = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            found[name] = (part(whole),)
    return found


def heads_of_rows(name: str, model_type: str, heads: int, kv_heads: int) -> int | None:
    """Heads whose rows must be reordered in a parameter; None if it stays as it is."""
    if not family_of(model_type).paired:
        return None
    module = name.rpartition(".")[0]
    if module.endswith("self_attn.q_proj"):
        return heads
    return kv_heads if module.endswith("self_attn.k_proj") else None
