"""`bitsearch quantize`: a checkpoint of a model under a policy, one matrix after another.

Two kinds. A *fake-quantized* one is an ordinary folder of 16-bit safetensors that
transformers opens anywhere: each weight is the value that its format stands for, rounded
to bfloat16 (float16 if the model itself is). That rounding moves a weight by at most
2⁻⁸ of itself in bfloat16, and 2⁻¹¹ in float16 above its subnormal range. The KL of
SmolLM2-135M in int4-g64 went from 0.5741 to 0.5748 by it (1024 tokens); `float32` has the
exact values. A *packed* one holds exactly the bytes that the policy counts
(`bitsearch.models.packed`).

Memory is that of a few copies of the largest matrix, where the model's files hold its
parameters one by one; models that transformers puts together from other tensors, such as
experts that are stored apart, and GGUF files are loaded as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.appearing import appearing, saving
from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import Format
from bitsearch.models.load import open_layout, quiet
from bitsearch.models.packed import POLICY, entries, metadata, persistent_buffers
from bitsearch.models.source import PACKED, with_weights
from bitsearch.models.weights import all_finite, write_weight
from bitsearch.models.writing import DeclaredFile, GatheredFile
from bitsearch.policy import load_policy
from bitsearch.restore import (
    Opened,
    assignment,
    candidate_weights,
    check_model,
    open_prepared,
    preparation_of,
)
from bitsearch.session import pick_device
from bitsearch.units import Matrix, ModelLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitsearch.objectives.weights import CandidateWeights

Progress = Callable[[str, int, int], None]

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
    decisions = {u.matrices[0]: format for u, format in assignment(policy, layout)}
    # the tensors of a packed one gather in a file of their own
    size = 2 * policy.achieved.bytes if packed else _WIDTHS[dtype] * layout.parameters
    with appearing(out, size, force, (POLICY, "config.json")) as folder:
        opened = open_prepared(source, preparation, device=pick_device(device))
        weights = candidate_weights(
            opened.model,
            policy,
            policy_path,
            statistics,
            cache_bytes=0,
            stored=opened.weights,
            device=pick_device(device),
        )
        content = policy_path.read_bytes()
        work = _Work(opened, layout, weights, decisions, dtype, folder, progress)
        with saving(out), quiet():
            if packed:
                _write_packed(work, metadata(content))
            elif opened.whole:
                _replace_and_save(work)
            else:
                _write_values(work)
            opened.tokenizer.save_pretrained(folder)
            (folder / POLICY).write_bytes(content)
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


@dataclass(frozen=True, slots=True)
class _Work:
    """What is written, and where to."""

    opened: Opened
    layout: ModelLayout
    weights: CandidateWeights
    decisions: Mapping[Matrix, Format]
    dtype: str
    folder: Path
    progress: Progress

    def matrices(self) -> Iterator[tuple[Matrix, Format]]:
        """Every matrix with its format, in forward order; tells how many are done."""
        for done, decision in enumerate(self.decisions.items()):
            self.progress("quantizing", done, len(self.decisions))
            yield decision
        self.progress("quantizing", len(self.decisions), len(self.decisions))

    def kept(self, name: str) -> Tensor:
        """What no policy decides, in the dtype of the checkpoint."""
        return _rounded(name, self.opened.weights.get_parameter(name), self.dtype)

    def describe(self) -> None:
        """Write the configuration."""
        model: Any = self.opened.model
        model.config.dtype = self.dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self.folder)
        if model.can_generate():
            model.generation_config.save_pretrained(self.folder)


def _write_packed(work: _Work, header: Mapping[str, str]) -> None:
    """Every tensor in the bytes that the policy counts."""
    types = {"bf16": "bfloat16", "fp16": "float16"}
    with GatheredFile(work.folder / PACKED, header) as file:
        for matrix, format in work.matrices():
            if format.exact:
                values = work.opened.weights.get_parameter(matrix.name)
                file.put(matrix.name, _rounded(matrix.name, values, types[format.kind]))
                continue
            for name, tensor in entries(
                matrix.name, work.weights.quantized(matrix, format)
            ).items():
                file.put(name, tensor)
        for name in work.layout.kept:
            file.put(name, work.kept(name))
        for name, buffer in persistent_buffers(work.opened.model).items():
            file.put(name, buffer)
    work.describe()


def _write_values(work: _Work) -> None:
    """Every weight's value in the shards that transformers would write."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    dtype = getattr(torch, work.dtype)
    shapes = {
        name: torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in work.opened.model.named_parameters()
    }
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size="50GB"
    )
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(
                DeclaredFile(
                    work.folder / file,
                    ((name, dtype, tuple(shapes[name].shape)) for name in names),
                    {"format": "pt"},
                )
            )
            for file, names in split.filename_to_tensors.items()
        }
        for matrix, format in work.matrices():
            target = _Target(torch.empty(shapes[matrix.name].shape))
            write_weight(target, matrix, work.weights.candidate(matrix, format))
            value = _rounded(matrix.name, target.parameter, work.dtype)
            files[split.tensor_to_filename[matrix.name]].put(matrix.name, value)
        for name in work.layout.kept:
            files[split.tensor_to_filename[name]].put(name, work.kept(name))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (work.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    work.describe()


@dataclass(frozen=True, slots=True)
class _Target:
    """One parameter that a matrix is written to."""

    parameter: Tensor

    def get_parameter(self, target: str) -> Tensor:
        return self.parameter


def _replace_and_save(work: _Work) -> None:
    """Put every weight's value in place, round all parameters, and let transformers write."""
    # Quantizing reads no weight but the matrix's own, so each may be replaced in turn.
    for matrix, format in work.matrices():
        write_weight(work.opened.model, matrix, work.weights.candidate(matrix, format))
    # Not `model.to`: buffers keep their dtype, as they do in the original checkpoint.
    for name, parameter in work.opened.model.named_parameters():
        parameter.data = _rounded(name, parameter, work.dtype)
    work.opened.model.save_pretrained(work.folder)


def _rounded(name: str, values: torch.Tensor, dtype: str) -> Tensor:
    """A contiguous copy on the CPU in a dtype that holds every value."""
    import torch

    found = values.detach().to("cpu", getattr(torch, dtype)).contiguous()
    if not all_finite(found):
        raise BadInput(
            f"{name} holds weights up to {float(values.abs().max()):.3g}, beyond {dtype}; "
            "use --dtype bfloat16"
        )
    return found
