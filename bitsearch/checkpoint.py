"""`bitsearch quantize`: a checkpoint of a model under a policy.

Two kinds. A *fake-quantized* one is an ordinary folder of 16-bit safetensors that
transformers opens anywhere: each weight is the value that its format stands for, rounded
to bfloat16 (float16 if the model itself is). That rounding moves a weight by at most
2⁻⁸ of itself in bfloat16, and 2⁻¹¹ in float16 above its subnormal range. The KL of
SmolLM2-135M in int4-g64 went from 0.5741 to 0.5748 by it (1024 tokens); `float32` has the
exact values. A *packed* one holds exactly the bytes that the policy counts
(`bitsearch.models.packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.appearing import appearing, saving
from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format
from bitsearch.models.load import LoadedModel, open_layout, quiet
from bitsearch.models.packed import POLICY, entries, metadata, persistent_buffers
from bitsearch.models.source import PACKED, with_weights
from bitsearch.models.weights import write_weight
from bitsearch.policy import load_policy
from bitsearch.restore import (
    assignment,
    candidate_weights,
    check_model,
    load_prepared,
    preparation_of,
)
from bitsearch.session import pick_device
from bitsearch.units import Matrix, ModelLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitsearch.objectives.weights import CandidateWeights

Progress = Callable[[str, int, int], None]
Decisions = list[tuple[Matrix, Format]]

_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}


def quantize_model(
    model: str,
    policy_path: Path,
    out: Path,
    *,
    packed: bool,
    dtype: str | None,
    statistics: Path | None,
    device: str,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write a model under a policy; weights are those that `eval` measures.

    Args:
        model: model reference; must be the one that the policy was made for.
        policy_path: the policy file.
        out: folder to make; it appears when it is complete.
        packed: exact bytes in bitsearch's own layout, instead of a fake-quantized folder.
        dtype: of the weights, or of a packed checkpoint's kept tensors: `bfloat16`,
            `float16`, or `float32` if not packed. None: float16 if the model is, else bfloat16.
        statistics: calibration statistics; by default the file that the policy names.
        device: where to quantize.
        force: replace a checkpoint that bitsearch wrote before.
        progress: called with stage, done, total.

    Raises:
        UsageError: the dtype cannot be used.
        BadInput: model and policy do not fit, or something else is in the way.
        OutOfResources: the disk is full, or cannot be written.
    """
    policy = load_policy(policy_path)
    preparation = preparation_of(policy, policy_path, statistics)
    untie = preparation is not None and preparation.untied
    layout, _, source = open_layout(model, untie=untie)
    dtype = _dtype(dtype, layout, packed)
    source = with_weights(source)
    check_model(policy, policy_path, source)
    decisions = [(u.matrices[0], format) for u, format in assignment(policy, layout)]
    size = policy.achieved.bytes if packed else _WIDTHS[dtype] * layout.parameters
    with appearing(out, size, force, (POLICY, "config.json")) as folder:
        loaded = load_prepared(source, preparation, dtype="float32", device=pick_device(device))
        weights = candidate_weights(loaded.model, policy, policy_path, statistics, cache_bytes=0)
        content = policy_path.read_bytes()
        # Quantizing reads no weight but the matrix's own, so each may be replaced in turn.
        if packed:
            tensors = _packed(loaded, weights, decisions, dtype, progress)
        else:
            _replace(loaded, weights, decisions, dtype, progress)
        progress("writing", 0, 1)
        with saving(out), quiet():
            if packed:
                _save_packed(loaded, tensors, metadata(content), dtype, folder)
            else:
                loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            (folder / POLICY).write_bytes(content)
        progress("writing", 1, 1)
        files = sorted(folder.glob("*.safetensors"))
        found = {
            "model": model,
            "policy": str(policy_path),
            "out": str(out),
            "packed": packed,
            "dtype": dtype,
            "policy_bytes": policy.achieved.bytes,
            "files": {file.name: file.stat().st_size for file in files},
        }
    return found


def _dtype(asked: str | None, layout: ModelLayout, packed: bool) -> str:
    """The dtype to write."""
    if asked is None:
        return "float16" if layout.dtype == "float16" else "bfloat16"
    if asked not in _WIDTHS:
        raise UsageError(f"--dtype {asked}: write {', '.join(_WIDTHS)}")
    if packed and _WIDTHS[asked] != 2:
        raise UsageError(
            f"--dtype {asked}: a packed checkpoint holds 16-bit tensors, which the policy counts; "
            "leave --dtype away, its quantized weights are exact"
        )
    return asked


def _packed(
    loaded: LoadedModel,
    weights: CandidateWeights,
    decisions: Decisions,
    dtype: str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Every stored tensor by name."""
    found: dict[str, Tensor] = {}
    types = {"bf16": "bfloat16", "fp16": "float16"}
    for done, (matrix, format) in enumerate(decisions):
        progress("quantizing", done, len(decisions))
        if format.exact:
            parameter = loaded.model.get_parameter(matrix.name)
            found[matrix.name] = _rounded(matrix.name, parameter, types[format.kind])
        else:
            found |= entries(matrix.name, weights.quantized(matrix, format))
    for name in loaded.layout.kept:
        found[name] = _rounded(name, loaded.model.get_parameter(name), dtype)
    buffers = persistent_buffers(loaded.model)
    found |= {name: buffer.contiguous().cpu() for name, buffer in buffers.items()}
    progress("quantizing", len(decisions), len(decisions))
    return found


def _save_packed(
    loaded: LoadedModel, tensors: dict[str, Tensor], header: dict[str, str], dtype: str, to: Path
) -> None:
    """A packed checkpoint without its tokenizer and policy."""
    from safetensors.torch import save_file

    model: Any = loaded.model
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(to)
    if model.can_generate():
        model.generation_config.save_pretrained(to)
    save_file(tensors, to / PACKED, metadata=header)


def _replace(
    loaded: LoadedModel,
    weights: CandidateWeights,
    decisions: Decisions,
    dtype: str,
    progress: Progress,
) -> None:
    """Put every weight's dequantized value in place, then round all parameters."""
    for done, (matrix, format) in enumerate(decisions):
        progress("quantizing", done, len(decisions))
        write_weight(loaded.model, matrix, weights.candidate(matrix, format))
    progress("quantizing", len(decisions), len(decisions))
    # Not `model.to`: buffers keep their dtype, as they do in the original checkpoint.
    for name, parameter in loaded.model.named_parameters():
        parameter.data = _rounded(name, parameter, dtype)


def _rounded(name: str, values: torch.Tensor, dtype: str) -> Tensor:
    """A contiguous copy on the CPU in a dtype that holds every value."""
    import torch

    found = values.detach().to("cpu", getattr(torch, dtype)).contiguous()
    if not found.isfinite().all():
        raise BadInput(
            f"{name} holds weights up to {float(values.abs().max()):.3g}, beyond {dtype}; "
            "use --dtype bfloat16"
        )
    return found
