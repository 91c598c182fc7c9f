"""Find the units of a model: which tensors get a decision, and which are kept.

Works on a skeleton without weights (`skeleton`) as well as on a loaded model;
both give the same layout, because only names, shapes and module types are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from bitsearch.errors import BadInput
from bitsearch.models.reason import reason
from bitsearch.units import Matrix, ModelLayout, Unit

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

# What serving engines concatenate into one matrix when they load a checkpoint:
# the fused name, and its members in the order of concatenation.
FUSED_SETS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)

_ATTENTION_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "c_proj": "o",
    "c_attn": "qkv",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "q_a_proj": "q_a",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_b_proj": "kv_b",
}
_MLP_ROLES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "w2": "down",
    "fc1": "fc1",
    "fc_in": "fc1",
    "c_fc": "fc1",
    "dense_h_to_4h": "fc1",
    "fc2": "fc2",
    "fc_out": "fc2",
    "c_proj": "fc2",
    "dense_4h_to_h": "fc2",
}


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, on the meta device: no weights, no memory.

    Raises:
        BadInput: the configuration is not one of a decoder-only language model.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    factory: Any = AutoModelForCausalLM
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"model type '{kind}' has an encoder; only decoder-only models are searched")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadInput(f"model type '{kind}' has no causal language model in transformers")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = factory.from_config(config)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise BadInput(f"this '{kind}' configuration is not valid: {reason(error)}") from error
    return model


def find_layout(
    model: PreTrainedModel,
    *,
    reference: str,
    revision: str | None = None,
    dtype: str = "float32",
    fuse: bool = True,
) -> ModelLayout:
    """The structure of a model; `model` may be a skeleton without weights.

    Units inside a block stand in the order in which the block defines them.

    Args:
        model: a causal language model of transformers.
        reference: what the user asked for; only recorded.
        revision: hub revision; only recorded.
        dtype: dtype of the checkpoint; only recorded.
        fuse: make one unit of matrices that engines fuse at run time.

    Raises:
        BadInput: the model has no list of decoder blocks, no token embedding,
            no head, or packs experts in an unknown arrangement.
    """
    blocks = find_blocks(model)
    embedding, head = _ends(model)
    modules = dict(model.named_modules())
    in_blocks: list[list[Matrix]] = [[] for _ in blocks]
    kept: dict[str, int] = {}
    excluded: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter is embedding.weight or parameter is head.weight:
            continue
        owner, _, leaf = name.rpartition(".")
        index = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        why = _why_kept(owner, leaf, modules, inside=index is not None)
        matrix = None if why else _matrix(owner, leaf, modules[owner])
        if matrix is None:
            kept[name] = parameter.numel()
            if parameter.dim() > 1 and not leaf.endswith("bias"):
                excluded[owner if why else name] = why or "not a linear layer"
        elif index is not None:
            in_blocks[index].append(matrix)

    names = {id(module): name for name, module in modules.items()}
    units = [_end_unit(names[id(embedding)], embedding.weight, "embedding")]
    for index, matrices in enumerate(in_blocks):
        units += _block_units(matrices, index, fuse)
    if head.weight is not embedding.weight:
        units.append(_end_unit(names[id(head)], head.weight, "head"))
    return ModelLayout(
        reference=reference,
        revision=revision,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype=dtype,
        units=tuple(units),
        blocks=blocks,
        kept=kept,
        excluded=excluded,
        tied=_ties(model),
    )


def find_units(model: PreTrainedModel, *, fuse: bool = True) -> tuple[Unit, ...]:
    """The units of a model in forward order; see `find_layout`."""
    return find_layout(model, reference=type(model).__name__, fuse=fuse).units


def find_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """Module names of the decoder blocks, in forward order.

    Raises:
        BadInput: the model has no list of `num_hidden_layers` blocks.
    """
    from torch import nn

    name = type(model).__name__
    config: Any = model.config.get_text_config(decoder=True)
    layers: int | None = getattr(config, "num_hidden_layers", None)
    names = {id(module): path for path, module in model.named_modules()}
    opened: Any = model
    decoder: nn.Module = opened.get_decoder()
    lists = [
        (names[id(module)], module)
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
    ]
    # Lists nested in a block (attentions, experts) may happen to be as long.
    nested = tuple(f"{path}." for path, _ in lists)
    found = [pair for pair in lists if len(pair[1]) == layers and not pair[0].startswith(nested)]
    if not found:
        raise BadInput(
            f"{name} cannot be searched: '{names[id(decoder)] or name}' "
            f"({type(decoder).__name__}) holds no list of {layers} decoder blocks"
        )
    path, blocks = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return tuple(f"{path}.{index}" for index in range(len(blocks)))


def _ends(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    """The token embedding and the language-model head."""
    from torch import nn

    opened: Any = model
    embedding, head = opened.get_input_embeddings(), opened.get_output_embeddings()
    name = type(model).__name__
    if not isinstance(embedding, nn.Embedding):
        raise BadInput(
            f"{name} cannot be searched: its token embedding is a {type(embedding).__name__}"
        )
    if not isinstance(head, nn.Linear):
        raise BadInput(f"{name} cannot be searched: it has no linear language-model head")
    return embedding, head


def _why_kept(owner: str, leaf: str, modules: dict[str, nn.Module], *, inside: bool) -> str:
    """The reason why a parameter gets no decision; empty if it may get one."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    module = modules[owner]
    if isinstance(module, nn.Embedding):
        return "not the token embedding"
    if isinstance(module, _ConvNd):
        return "convolution"
    if not inside:
        return "outside the decoder blocks"
    if _routes(owner, modules):
        return "router"
    if owner.rpartition(".")[2] == "dt_proj" and leaf == "weight":
        # State-space layers hand this weight to the scan; the module sees no forward call.
        return "step size of a state-space layer"
    return ""


def _routes(owner: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module decides which experts see a token."""
    parts = owner.split(".")
    outer = [modules[".".join(parts[:end])] for end in range(1, len(parts) + 1)]
    if any("router" in type(module).__name__.lower() for module in outer):
        return True
    gate = parts[-1] == "router" or parts[-1].endswith("gate")
    return gate and any("expert" in name for name, _ in outer[-2].named_children())


def _matrix(owner: str, leaf: str, module: nn.Module) -> Matrix | None:
    """The matrix of a parameter inside a block; None if it is not one."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    parameter = module.get_parameter(leaf)
    shape = tuple(parameter.shape)
    name = f"{owner}.{leaf}"
    if isinstance(module, nn.Linear) and leaf == "weight":
        return Matrix(name, shape[0], shape[1], role=_role(owner))
    if isinstance(module, Conv1D) and leaf == "weight":
        return Matrix(name, shape[1], shape[0], transposed=True, role=_role(owner))
    if len(shape) == 3:
        transposed = _packed_transposed(owner, module)
        rows, columns = shape[1:][::-1] if transposed else shape[1:]
        return Matrix(name, rows, columns, shape[0], transposed, _role(name))
    return None


def _packed_transposed(owner: str, module: nn.Module) -> bool:
    """Whether packed experts are stored as (experts, in, out) instead of (experts, out, in)."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    shapes = {leaf: tuple(p.shape) for leaf, p in module.named_parameters() if p.dim() == 3}
    gate_up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    if gate_up and down:
        # gate and up are stacked along the output axis: twice as wide as the input of down.
        if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
            return False
        if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:
            return True
    raise BadInput(
        f"'{owner}' ({type(module).__name__}) packs its experts in an unknown arrangement: "
        + ", ".join(f"{leaf} {list(shape)}" for leaf, shape in shapes.items())
    )


def _role(path: str) -> str:
    """Place in the block, e.g. `attn.q`, from a module name; empty if unknown."""
    parent, _, leaf = path.rpartition(".")
    place = parent.rpartition(".")[2].lower()
    if "attn" in place or "attention" in place:
        role = _ATTENTION_ROLES.get(leaf)
        return f"attn.{role}" if role else ""
    role = _MLP_ROLES.get(leaf)
    if not role:
        return ""
    return f"experts.{role}" if place == "experts" else f"mlp.{role}"


def _end_unit(name: str, weight: Tensor, kind: Literal["embedding", "head"]) -> Unit:
    """The unit of the token embedding or of an untied head."""
    rows, columns = weight.shape
    return Unit(name, kind, (Matrix(f"{name}.weight", rows, columns, role=kind),))


def _block_units(matrices: Iterable[Matrix], block: int, fuse: bool) -> Iterator[Unit]:
    """Units of one block; a fused set stands where its first member is defined."""
    by_name = {_unit_name(matrix): matrix for matrix in matrices}
    fused: dict[str, Unit] = {}
    if fuse:
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in by_name):
            for leaf, members in FUSED_SETS:
                found = [m for n in members if (m := by_name.get(f"{parent}.{n}")) is not None]
                if len(found) > 1 and len({m.in_features for m in found}) == 1:
                    unit = Unit(f"{parent}.{leaf}", "fused", tuple(found), block)
                    fused |= {_unit_name(member): unit for member in found}
    done: set[str] = set()
    for name, matrix in by_name.items():
        unit = fused.get(name) or Unit(
            name, "linear" if matrix.name.endswith(".weight") else "experts", (matrix,), block
        )
        if unit.name not in done:
            done.add(unit.name)
            yield unit


def _unit_name(matrix: Matrix) -> str:
    """Module name of a matrix; packed experts have only a parameter name."""
    return matrix.name.removesuffix(".weight")


def _ties(model: PreTrainedModel) -> tuple[tuple[str, ...], ...]:
    """Sets of parameter names that share one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
