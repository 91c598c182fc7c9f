"""NVIDIA ModelOpt: a recipe for its quantizer, and the `hf_quant_config.json` of its exports.

`recipe.yaml` is what `modelopt.recipe.load_recipe` reads; ModelOpt then quantizes and
exports the model itself. `hf_quant_config.json` says the same as TensorRT-LLM, vLLM and
SGLang read it. vLLM leaves a layer whose algorithm it does not know unquantized, without
a word: of these, it knows W4A16_NVFP4, FP8_PER_CHANNEL_PER_TOKEN and MXFP8.

No weights are written: engines take the largest of the NVFP4 tensor scales of matrices
that they fuse for all of them, so that checkpoints with a scale for each would be read
wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Reading, Translation
from bitsearch.exporters.checkpoints import read_json
from bitsearch.exporters.fit import fit, linear_refusal
from bitsearch.formats import Format, parse_format
from bitsearch.policy import Policy, PolicyModule
from bitsearch.units import ModelLayout

CONFIG, RECIPE = "hf_quant_config.json", "recipe.yaml"

# By format: the algorithm in the configuration; cfg of the weight quantizer, and of the
# quantizer of inputs, in YAML.
_NVFP4 = "{num_bits: e2m1, axis: null, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3}}"
_MXFP8 = "{num_bits: e4m3, axis: null, block_sizes: {-1: 32, type: dynamic, scale_bits: e8m0}}"
_ROWS = "{num_bits: e4m3, axis: 0}"
_TOKENS = "{num_bits: e4m3, axis: null, type: dynamic, block_sizes: {-1: null}}"
_ALGORITHMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "nvfp4": ({"quant_algo": "W4A16_NVFP4", "group_size": 16}, _NVFP4, ""),
    "int8-row-sym": ({"quant_algo": "W8A16"}, "{num_bits: 8, axis: 0}", ""),
    "fp8": ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, _ROWS, _TOKENS),
    "mxfp8": ({"quant_algo": "MXFP8", "group_size": 32}, _MXFP8, _MXFP8),
    **{
        f"int4-g{size}-sym": (
            {
                "quant_algo": "W4A16_AWQ",
                "group_size": size,
                "has_zero_point": False,
                "pre_quant_scale": True,
            },
            f"{{num_bits: 4, axis: null, block_sizes: {{-1: {size}, type: static}}}}",
            "",
        )
        for size in (64, 128)
    },
}
# What else ModelOpt writes: the nearest of our formats, and what that leaves out.
_NEAREST = {
    "FP8": ("fp8", "one scale for a whole tensor, and activations in FP8"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", "activations in FP8"),
    "NVFP4": ("nvfp4", "activations in NVFP4"),
    "NVFP4_AWQ": ("nvfp4", "activations in NVFP4, and scales of input columns"),
    "W4A16_NVFP4": ("nvfp4", ""),
    "MXFP8": ("mxfp8", "activations in MXFP8"),
    "W4A8_MXFP4_FP8": ("mxfp4", "activations in FP8"),
    "MXFP4": ("mxfp4", "activations in MXFP4"),
    "W8A16": ("int8-row-sym", ""),
    "W8A8_SQ_PER_CHANNEL": ("int8-row-sym", "activations in INT8, and scales of input columns"),
}


def translate(policy: Policy) -> Translation:
    """Formats that ModelOpt has an algorithm for; fused sets in one format."""
    formats, losses = fit(policy, "modelopt", _refusal, fused=True)
    losses += [
        Loss("ACT_QUANTIZED", tensor, "16-bit inputs", _ALGORITHMS[f.name][0]["quant_algo"])
        for tensor, f in formats.items()
        if not f.exact and _ALGORITHMS[f.name][2]
    ]
    return Translation(formats, tuple(losses))


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why ModelOpt does not hold a tensor in a format."""
    if format.exact:
        return ""
    if format.name not in _ALGORITHMS:
        return f"it has an algorithm for {', '.join(_ALGORITHMS)} alone"
    return linear_refusal(tensor, module, format)


def write(
    policy: Policy, translation: Translation, folder: Path, _: Checkpoint | None
) -> Mapping[str, int]:
    """Both files."""
    modules = {
        tensor.removesuffix(".weight"): format
        for tensor, format in translation.formats.items()
        if tensor.endswith(".weight") and policy.modules[tensor].role != "embedding"
    }
    quantized = {name: format for name, format in modules.items() if not format.exact}
    if not quantized:
        raise BadInput("nothing is quantized in this policy: modelopt has nothing to say")
    kept = [name for name in modules if name not in quantized]
    config = {
        "producer": {"name": "bitsearch"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": {name: _ALGORITHMS[f.name][0] for name, f in quantized.items()},
            "exclude_modules": [*kept, *policy.excluded],
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(_recipe(quantized), encoding="utf-8")
    return {}


def _recipe(quantized: Mapping[str, Format]) -> str:
    """The recipe: all off, then each quantizer by its full name. Later entries count."""
    lines = [
        "metadata:",
        "  recipe_type: ptq",
        "  description: a policy of bitsearch",
        "quantize:",
        "  algorithm: max",  # awq_lite fails beside other formats
        "  quant_cfg:",
        "    - {quantizer_name: '*', enable: false}",
    ]
    for name, format in quantized.items():
        _, weights, inputs = _ALGORITHMS[format.name]
        for quantizer, text in (("weight_quantizer", weights), ("input_quantizer", inputs)):
            if text:
                lines.append(f"    - {{quantizer_name: '{name}.{quantizer}', cfg: {text}}}")
    return "\n".join(lines) + "\n"


def read(path: Path, layout: ModelLayout) -> Reading:
    """The formats of a `hf_quant_config.json`, or of the config.json of an export.

    Raises:
        BadInput: it is neither, or says what no policy can hold.
    """
    config = read_json(path, CONFIG, "quantization_config")
    config = config.get("quantization", config)
    base, layers = config.get("quant_algo"), config.get("quantized_layers") or {}
    excluded = config.get("exclude_modules") or config.get("ignore") or []
    if not isinstance(base, str):
        raise BadInput(f"{path} is not of ModelOpt: it names no quant_algo")
    formats: dict[str, Format] = {}
    notes: dict[str, None] = {}
    for unit in layout.units:
        for matrix in unit.matrices:
            skipped = any(fnmatchcase(matrix.module, pattern) for pattern in excluded)
            said = layers.get(matrix.module)
            if said is None and not layers and unit.block is not None and not skipped:
                said = config
            if said is not None and matrix.name.endswith(".weight"):
                formats[matrix.name], note = _read_algorithm(path, said)
                notes |= {note: None} if note else {}
    if config.get("kv_cache_quant_algo"):
        notes[f"the KV cache in {config['kv_cache_quant_algo']}"] = None
    return Reading(formats, notes=tuple(notes))


def _read_algorithm(path: Path, said: Mapping[str, Any]) -> tuple[Format, str]:
    """A format from what is said of a layer, and what the format leaves out."""
    name, size = str(said.get("quant_algo")).upper(), said.get("group_size")
    if name in ("W4A16_AWQ", "W4A8_AWQ"):
        note = "activations in FP8" if name == "W4A8_AWQ" else ""
        return parse_format(f"int4-g{size}{'' if said.get('has_zero_point') else '-sym'}"), note
    if name not in _NEAREST:
        raise BadInput(f"{path}: no format of ours is {name}")
    format, note = _NEAREST[name]
    return parse_format(format), note


EXPORTER = Exporter(
    about="ModelOpt 0.47 recipes and hf_quant_config.json, for TensorRT-LLM, vLLM, SGLang",
    translate=translate,
    write=write,
    read=read,
    writes_weights=False,
)
