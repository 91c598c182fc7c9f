"""What gets decided: matrices of a model, and the units that group them.

Plain data without torch, so that planning needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

UnitKind = Literal["linear", "fused", "experts", "embedding", "head"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One quantizable tensor, or a stack of equal ones (the experts of a layer).

    Attributes:
        name: full parameter name, as `model.named_parameters()` gives it.
        out_features: rows; each row is quantized by itself.
        in_features: columns, the reduction axis that groups run along.
        count: matrices stacked along the parameter's first axis.
        transposed: stored as (in, out), as in GPT-2's Conv1D.
        role: place in the block, e.g. `attn.q`, `mlp.gate`, `embedding`.
    """

    name: str
    out_features: int
    in_features: int
    count: int = 1
    transposed: bool = False
    role: str = ""

    @property
    def module(self) -> str:
        """Name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Unit:
    """What gets one decision: a matrix, or a set that an engine fuses at run time.

    Attributes:
        name: the module name; of a fused set, the fused module's name.
        kind: what the unit is.
        matrices: members, in the order the run time concatenates them.
        block: index of the decoder block, or None outside of the blocks.
    """

    name: str
    kind: UnitKind
    matrices: tuple[Matrix, ...]
    block: int | None = None

    @property
    def parameters(self) -> int:
        """Number of weights in all members."""
        return sum(matrix.parameters for matrix in self.matrices)


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The structure of a model, known from its configuration alone.

    Attributes:
        reference: what the user asked for (a path, hub id or built-in name).
        revision: hub revision, None for local files and built-ins.
        architecture: model class, e.g. `LlamaForCausalLM`.
        model_type: transformers' model type, e.g. `llama`.
        dtype: dtype of the checkpoint, e.g. `bfloat16`.
        units: every unit, in forward order: embedding, blocks, head.
        blocks: module names of the decoder blocks in forward order.
        kept: parameters that stay at 16 bits (norms, biases, routers …): numel by name.
        excluded: quantizable-looking modules left out, with the reason.
        tied: sets of parameter names that share one tensor.
    """

    reference: str
    revision: str | None
    architecture: str
    model_type: str
    dtype: str
    units: tuple[Unit, ...]
    blocks: tuple[str, ...]
    kept: Mapping[str, int]
    excluded: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied tensor counted once."""
        return sum(unit.parameters for unit in self.units) + sum(self.kept.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of everything that is not a unit, at 16 bits."""
        return 2 * sum(self.kept.values())
