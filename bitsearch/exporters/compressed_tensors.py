"""compressed-tensors: the checkpoints of vLLM, SGLang and transformers.

Without weights: `quantization_config.json`, and `recipe.yaml` for llm-compressor, which
quantizes the model again. With weights: a checkpoint in the pack-quantized layout, whose
codes, scales and zero points are the measured ones, bit for bit. Scales stay float16 in
the file; an engine that runs in bfloat16 rounds them, by at most 2⁻⁹ of themselves.

Every module is named in full: a pattern such as `re:.*v_proj$` also matches the fused
`qkv_proj` of an engine, and a class such as `Linear` beats names in SGLang. What stays at
16 bits is listed in `ignore`, without which SGLang refuses the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, save_checkpoint
from bitsearch.exporters.fit import fit, fused_sets
from bitsearch.exporters.matching import matching_modules
from bitsearch.exporters.words import words
from bitsearch.formats import BF16, Format
from bitsearch.formats.integer import INT_BITS, IntFormat
from bitsearch.policy import Policy, PolicyModule
from bitsearch.targets.stored import compressed_tensors as stored_bytes
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.quantized import Quantized

CONFIG, RECIPE = "quantization_config.json", "recipe.yaml"


def translate(policy: Policy) -> Translation:
    """Integers as they are, but not of ragged groups; fused sets in one format."""
    formats, losses = fit(policy, "compressed-tensors", _refusal, fused=True)
    size = policy.achieved.kept_bytes
    for tensor, module in policy.modules.items():
        size += module.count * stored_bytes(*module.shape, formats[tensor])
    return Translation(formats, tuple(losses), size)


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why the layout does not hold a tensor in a format."""
    if format.exact:
        return ""
    if not isinstance(format, IntFormat):
        return "only integers are written"
    if not tensor.endswith(".weight"):
        return "stacked experts are not written"
    if module.role == "embedding":
        return "embeddings stay at 16 bits"
    if format.group_size and module.shape[1] % format.group_size:
        return f"groups of {format.group_size} do not divide rows of {module.shape[1]}"
    return ""


def quantization_config(policy: Policy, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    modules = {name: formats[name] for name in policy.modules if name.endswith(".weight")}
    grouped: dict[Format, list[str]] = {}
    ignore = []
    for tensor, format in modules.items():
        name = tensor.removesuffix(".weight")
        if not format.exact:
            grouped.setdefault(format, []).append(name)
        elif policy.modules[tensor].role != "embedding":
            ignore.append(name)
    tied = {name for names in policy.model.tied for name in names} - policy.modules.keys()
    ignore += [name.removesuffix(".weight") for name in sorted(tied)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "weights": _weights(format),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for index, (format, names) in enumerate(grouped.items())
        },
        "ignore": [*ignore, *policy.excluded],
        "kv_cache_scheme": None,
    }


def _weights(format: Format) -> dict[str, Any]:
    """The weight arguments of a scheme."""
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "channel" if format.group_size is None else "group",
        "group_size": format.group_size,
        "dynamic": False,
    }


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """The configuration for llm-compressor, or a checkpoint."""
    config = quantization_config(policy, translation.formats)
    if checkpoint is None:
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        modifier = {key: config[key] for key in ("config_groups", "ignore")}
        for group in modifier["config_groups"].values():
            del group["format"]
        recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
        # JSON is YAML
        (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        return {}
    return save_checkpoint(checkpoint, translation, packed, config, folder)


def packed(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The stored tensors of a matrix; `name` is the module's."""
    import torch

    format = quantized.format
    found = {
        f"{name}.weight_packed": words(quantized.codes, format.bits),
        f"{name}.weight_scale": quantized.scales.cpu().contiguous(),
        f"{name}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if not format.symmetric:
        zeros = words(quantized.zeros.T.contiguous(), format.bits)
        found[f"{name}.weight_zero_point"] = zeros.T.contiguous()
    return found


def read(path: Path, layout: ModelLayout) -> Reading:
    """The formats of a checkpoint, of its config.json, or of `quantization_config.json`.

    Raises:
        BadInput: it is none of these, or says what no policy can hold.
    """
    config = read_json(path, CONFIG, "quantization_config")
    if config.get("quant_method") != "compressed-tensors":
        raise BadInput(f"{path} is not of compressed-tensors")
    formats: dict[str, Format] = {}
    notes: list[str] = []
    modules = {m.module: m.name for unit in layout.units for m in unit.matrices}
    ignored = set(matching_modules(config.get("ignore") or [], layout))
    for group in (config.get("config_groups") or {}).values():
        format = _read_weights(path, group.get("weights") or {})
        if group.get("input_activations"):
            notes.append("activations are quantized")
        for module in matching_modules(group.get("targets") or [], layout):
            if module not in ignored:
                formats.setdefault(modules[module], format)
    if config.get("kv_cache_scheme"):
        notes.append("the KV cache is quantized")
    for name, members in fused_sets(modules.values()):
        if len({formats.get(member, BF16) for member in members}) > 1:
            notes.append(f"{name} is of several formats, which engines that fuse it refuse")
    return Reading(formats, notes=tuple(dict.fromkeys(notes)))


def _read_weights(path: Path, weights: dict[str, Any]) -> Format:
    """A format from the weight arguments of a scheme."""
    bits: Any = weights.get("num_bits")
    group: Any = weights.get("group_size")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    grouped = strategy == "group" and isinstance(group, int) and group > 0
    if kind != "int" or bits not in INT_BITS or not (grouped or strategy == "channel"):
        raise BadInput(f"{path}: no format of ours is {bits}-bit {kind} by {strategy}")
    size = group if grouped else None
    return IntFormat("int", bits, size, bool(weights.get("symmetric", True)))


EXPORTER = Exporter(
    about="compressed-tensors 0.20 checkpoints for vLLM, SGLang, transformers; llm-compressor "
    "recipes",
    translate=translate,
    write=write,
    read=read,
)
