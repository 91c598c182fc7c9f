"""What every exporter is: losses told before anything is written, then files.

An exporter works in two steps. `translate` sees the policy alone: it says in which format
the target will hold every tensor, which losses that means, and how many bytes the target
will store. `write` puts the files into a folder: the configuration that the target reads
and, where the weights are given, a checkpoint whose codes are those that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.policy import Policy
from bitsearch.units import Matrix, ModelLayout

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.models.load import LoadedModel
    from bitsearch.objectives.weights import CandidateWeights

Progress = Callable[[str, int, int], None]

LOSSES: Mapping[str, str] = {
    "ACT_QUANTIZED": "the target quantizes activations too",
    "EMBED_DROPPED": "the embedding stays at 16 bits",
    "FUSED_HARMONISED": "matrices that the target fuses take the widest format among them",
    "GROUP_COERCED": "another group size",
    "HEAD_DROPPED": "the head stays at 16 bits",
    "KV_KV_MERGED": "K and V take one format",
    "KV_LAYER_COLLAPSED": "all layers of the KV cache take one format",
    "LAYER_COLLAPSED": "layers of one type take one format",
    "NAME_ONLY": "a configuration alone: the target quantizes again",
    "PREPARATION_DROPPED": "without its weights the model is not prepared as it was measured",
    "SCALE_FORMAT_CHANGED": "scales are stored in another format",
    "SCALE_SHARED": "fused matrices are rounded again with one tensor scale",
    "SYM_COERCED": "symmetry is changed",
    "WIDTH_PROMOTED": "more bits",
    "WIDTH_UNSERVED": "the file holds it, but the engine has no kernel for it",
}


@dataclass(frozen=True, slots=True)
class Loss:
    """A way in which the target's model is not the policy's.

    Attributes:
        code: one of `LOSSES`.
        module: the tensor or module that it is about.
        from_: what the policy says.
        to: what the target gets.
    """

    code: str
    module: str
    from_: str
    to: str

    def describe(self) -> dict[str, str]:
        """As JSON values."""
        return {"code": self.code, "module": self.module, "from": self.from_, "to": self.to}


@dataclass(frozen=True, slots=True)
class Translation:
    """What the target will hold.

    Attributes:
        formats: format by full tensor name, for each tensor of the policy.
        losses: where that, or something else, is not what the policy says.
        bytes: of the tensors that `write` stores with a checkpoint, file headers not
            counted; None if it writes no weights.
    """

    formats: Mapping[str, Format]
    losses: tuple[Loss, ...] = ()
    bytes: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The weights that a policy was measured with.

    Attributes:
        loaded: the model in float32, holding its reference weights.
        weights: quantizes its matrices as the policy's quantizer does.
        source: the folder or GGUF file of the model.
        dtype: of norms and biases, and what the configuration says: `bfloat16`,
            `float16` or `float32`.
        progress: called with stage, done, total.
    """

    loaded: LoadedModel
    weights: CandidateWeights
    source: Path
    dtype: str
    progress: Progress

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every matrix that the policy decides, by tensor name."""
        return {m.name: m for unit in self.loaded.layout.units for m in unit.matrices}

    def plain(self, name: str) -> Tensor:
        """A parameter as it is, on the CPU, in the dtype of the checkpoint.

        Raises:
            BadInput: a value is beyond that dtype.
        """
        import torch

        value = self.loaded.model.get_parameter(name).detach()
        found = value.to("cpu", getattr(torch, self.dtype)).contiguous()
        if not found.isfinite().all():
            raise BadInput(f"{name} holds weights beyond {self.dtype}")
        return found


@dataclass(frozen=True, slots=True)
class Reading:
    """What an importer found in another tool's files.

    Attributes:
        formats: format by full tensor name; tensors that are not named stay at 16 bits.
        method: how the tool rounds, as it names it.
        notes: what a policy cannot hold, one line each.
    """

    formats: Mapping[str, Format]
    method: str = "rtn"
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Exporter:
    """A target.

    Attributes:
        about: one line: what is written, for which version of what.
        translate: policy -> what the target will hold. Raises BadInput, naming the unit,
            where the target cannot hold it at all, whatever loss is allowed.
        write: (policy, its translation, folder, weights or None) -> bytes of the tensors
            in each file that holds weights, as read back from the file, headers not
            counted; empty without weights.
        read: (file or folder, the model's layout) -> formats; None if the target's files
            carry no mixed configuration.
        needs_weights: whether there is nothing to write without weights.
        writes_weights: whether weights can be written.
    """

    about: str
    translate: Callable[[Policy], Translation]
    write: Callable[[Policy, Translation, Path, Checkpoint | None], Mapping[str, int]]
    read: Callable[[Path, ModelLayout], Reading] | None = None
    needs_weights: bool = False
    writes_weights: bool = True


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        files: every file by name, with its bytes.
        losses: as allowed.
        predicted_bytes: what `Translation.bytes` said.
        tensor_bytes: what the weight files hold, headers not counted; None without weights.
    """

    files: Mapping[str, int]
    losses: tuple[Loss, ...]
    predicted_bytes: int | None
    tensor_bytes: int | None

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "files": dict(self.files),
            "losses": [loss.describe() for loss in self.losses],
            "predicted_bytes": self.predicted_bytes,
            "tensor_bytes": self.tensor_bytes,
        }
