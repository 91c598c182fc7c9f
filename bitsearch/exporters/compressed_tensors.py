"""compressed-tensors: the checkpoints of vLLM, SGLang and transformers.

Without weights: `quantization_config.json`, and `recipe.yaml` for llm-compressor, which
quantizes the model again. With weights: a checkpoint whose codes, scales and zero points
are the measured ones, bit for bit; `compressed_schemes` has the layouts. Scales of integers
stay float16 in the file; an engine that runs in bfloat16 rounds them, by at most 2⁻⁹ of
themselves.

Every module is named in full: a pattern such as `re:.*v_proj$` also matches the fused
`qkv_proj` of an engine, and a class such as `Linear` beats names in SGLang. What stays at
16 bits is listed in `ignore`, without which SGLang refuses the checkpoint.

An engine that fuses NVFP4 matrices takes one of their tensor scales for all of them. Such
sets are quantized as the one matrix that they become, and share its scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, save_checkpoint
from bitsearch.exporters.compressed_schemes import (
    layout_of,
    layout_of_all,
    packed,
    read_weights,
    weight_arguments,
)
from bitsearch.exporters.fit import checkpoint_bytes, fit, fused_sets, linear_refusal
from bitsearch.exporters.matching import matching_modules
from bitsearch.formats import BF16, Format
from bitsearch.policy import Policy, PolicyModule
from bitsearch.targets.stored import compressed_tensors as stored_bytes
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from bitsearch.quantizers.codec import Encoded
    from bitsearch.quantizers.levelled import Levelled

CONFIG, RECIPE = "quantization_config.json", "recipe.yaml"


def translate(policy: Policy) -> Translation:
    """Integers and floats as they are, but not of ragged groups; fused sets in one format."""
    formats, losses = fit(policy, "compressed-tensors", _refusal, fused=True)
    losses += [
        Loss("SCALE_SHARED", member, "a tensor scale of its own", f"one for {name}")
        for name, members in _sharing(formats)
        for member in members
    ]
    size = checkpoint_bytes(policy, formats, stored_bytes)
    return Translation(formats, tuple(losses), size)


def _sharing(formats: Mapping[str, Format]) -> list[tuple[str, list[str]]]:
    """Fused sets whose members have a scale for the whole matrix."""
    return [(n, found) for n, found in fused_sets(formats) if formats[found[0]].kind == "nvfp4"]


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why no layout holds a tensor in a format."""
    if format.exact:
        return ""
    if layout_of(format) is None:
        return "integers, fp8, mxfp8, mxfp4 and nvfp4 are written"
    return linear_refusal(tensor, module, format)


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
    layouts = {format: layout_of(format) or "" for format in grouped}
    return {
        "quant_method": "compressed-tensors",
        "format": layout_of_all(set(layouts.values())),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "weights": weight_arguments(format),
                "input_activations": None,
                "output_activations": None,
                "format": layouts[format],
            }
            for index, (format, names) in enumerate(grouped.items())
        },
        "ignore": [*ignore, *policy.excluded],
        "kv_cache_scheme": None,
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
    shared = _shared(checkpoint, translation.formats)
    return save_checkpoint(checkpoint, translation, packed, config, folder, encoded=shared)


def _shared(checkpoint: Checkpoint, formats: Mapping[str, Format]) -> dict[str, Encoded]:
    """Members of fused sets with one tensor scale, by name; each set quantized as a whole."""
    found: dict[str, Encoded] = {}
    for _, members in _sharing(formats):
        matrices = [checkpoint.matrices[name] for name in members]
        whole = cast("Levelled", checkpoint.weights.together(matrices, formats[members[0]]))
        heights = [matrix.out_features for matrix in matrices]
        parts = zip(members, whole.codes.split(heights), whole.scales.split(heights), strict=True)
        found |= {name: replace(whole, codes=c, scales=s) for name, c, s in parts}
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
        format, note = read_weights(path, group.get("weights") or {})
        notes += [note] if note else []
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


EXPORTER = Exporter(
    about="compressed-tensors 0.20 checkpoints for vLLM, SGLang, transformers; llm-compressor "
    "recipes",
    translate=translate,
    write=write,
    read=read,
)
