"""Packed checkpoints: every tensor in exactly the bytes that its policy counts.

A folder holds `packed.safetensors`, the `policy.json` that says how to read it, and the
configuration and tokenizer of the model. In the file, by full parameter name:

- a matrix in a 16-bit format, and what no policy decides (norms, biases, routers),
  is one 16-bit tensor in the model's own shape;
- any other matrix is the packed tensors of its format, `NAME/codes`, `NAME/scales` …;
  of a stack of experts each has its own, `NAME/0/codes` …;
- persistent buffers, which are no parameters and which policies do not count, keep
  their dtype. Few models have any.

The header's metadata holds the schema and the SHA-256 of `policy.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.models.layout import find_layout
from bitsearch.models.reason import reason
from bitsearch.models.source import PACKED, Source, read_config
from bitsearch.models.weights import write_weight
from bitsearch.policy import Policy, load_policy
from bitsearch.units import Matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from bitsearch.quantizers.codec import Encoded

SCHEMA = "bitsearch.packed/1"
POLICY = "policy.json"


def metadata(policy: bytes) -> dict[str, str]:
    """What the header says: the schema, and which policy file belongs to the tensors."""
    return {"schema": SCHEMA, "policy_sha256": hashlib.sha256(policy).hexdigest()}


def entries(name: str, parts: Sequence[Encoded]) -> dict[str, Tensor]:
    """The stored tensors of a matrix, or of each matrix of a stack."""
    return {
        f"{prefix}/{key}": tensor.contiguous()
        for prefix, part in zip(_prefixes(name, len(parts)), parts, strict=True)
        for key, tensor in part.pack().items()
    }


def persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model's state holds besides its parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in parameters}


def load_packed(
    folder: Path | str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """A model of transformers with the dequantized weights of a packed checkpoint.

    In float32 the weights are exactly those that were measured; the kept tensors have
    been rounded to 16 bits.

    Args:
        folder: what `bitsearch quantize --packed` wrote.
        dtype: dtype of the parameters, or `auto` for that of the kept tensors.
        device: where the parameters go.
        attention: attention implementation of transformers, None for its default.

    Raises:
        BadInput: the folder is no packed checkpoint, or is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    policy = _policy_of(folder)
    config = read_config(Source(str(folder), None, folder))
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    factory: Any = AutoModelForCausalLM
    # Buffers that are computed and not stored want a real construction; its random
    # weights, which are all overwritten, must not touch the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = factory.from_config(config, dtype=dtype, **options)
    model.eval().requires_grad_(False).to(device)
    _fill(model, policy, folder / PACKED)
    if (folder / "generation_config.json").is_file():
        opened: Any = model
        opened.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _policy_of(folder: Path) -> Policy:
    """The policy that the tensors were packed by."""
    from safetensors import SafetensorError, safe_open

    file, path = folder / PACKED, folder / POLICY
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file} is damaged or missing: {error}") from error
    if header.get("schema") != SCHEMA:
        raise BadInput(
            f"{file} has schema {header.get('schema')!r}, this bitsearch reads {SCHEMA!r}; "
            "use the version of bitsearch that wrote it"
        )
    policy = load_policy(path)
    if metadata(path.read_bytes()) != header:
        raise BadInput(f"{path} is not the policy that {file} was packed by")
    return policy


def _fill(model: PreTrainedModel, policy: Policy, file: Path) -> None:
    """Overwrite everything that a model stores with what a packed file holds."""
    import torch
    from safetensors import SafetensorError, safe_open

    layout = find_layout(model, reference=policy.model.reference)
    matrices = [matrix for unit in layout.units for matrix in unit.matrices]
    plain = dict(persistent_buffers(model))
    plain |= {name: model.get_parameter(name) for name in layout.kept}
    try:
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            unread = set(stored.keys())

            def take(name: str) -> Tensor:
                unread.discard(name)
                tensor: Tensor = stored.get_tensor(name)
                return tensor

            for matrix in matrices:
                format = policy.format_of(matrix.name)
                if format.exact:
                    plain[matrix.name] = model.get_parameter(matrix.name)
                    continue
                found: list[dict[str, Tensor]] = []
                for prefix in _prefixes(matrix.name, matrix.count):
                    inside = sorted(key for key in unread if key.startswith(f"{prefix}/"))
                    found.append({key.rpartition("/")[2]: take(key) for key in inside})
                write_weight(model, matrix, _dequantized(matrix, format, found))
            for name, target in plain.items():
                value = take(name)
                if value.shape != target.shape:
                    raise ValueError(f"{name} is {list(value.shape)}, not {list(target.shape)}")
                target.copy_(value)
    except (LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise BadInput(f"{file} does not hold this model: {reason(error)}") from error
    if unread:
        raise BadInput(f"{file} holds {len(unread)} unknown tensors, e.g. '{min(unread)}'")


def _dequantized(matrix: Matrix, format: Format, packed: Sequence[dict[str, Tensor]]) -> Tensor:
    """(count·out, in) float32 values of a matrix, or of a stack."""
    import torch

    from bitsearch.quantizers.codec import codec_of

    size = format.bytes(matrix.out_features, matrix.in_features)
    if any(sum(tensor.nbytes for tensor in part.values()) != size for part in packed):
        raise ValueError(f"{matrix.name} is not {size} bytes in {format.name}")
    unpack = codec_of(format).unpack
    return torch.cat([unpack(part, format, matrix.in_features).dequantize() for part in packed])


def _prefixes(name: str, count: int) -> list[str]:
    """Where the tensors of each matrix of a stack are."""
    return [name] if count == 1 else [f"{name}/{index}" for index in range(count)]
