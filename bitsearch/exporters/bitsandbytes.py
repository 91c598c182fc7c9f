"""bitsandbytes through transformers: one format, and a list of what is not quantized.

The configuration is that of `BitsAndBytesConfig`. Skipped modules are full names: a
pattern such as `layers.1` would also skip a layer 10. The library quantizes as it loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Reading, Translation
from bitsearch.exporters.checkpoints import read_json
from bitsearch.exporters.fit import fit
from bitsearch.formats import Format, parse_format
from bitsearch.policy import Policy, PolicyModule
from bitsearch.units import ModelLayout

CONFIG = "quantization_config.json"
_FOUR = {"nf4-g64": "nf4", "fp4-g64": "fp4"}
_EIGHT = "int8-row-sym"


def translate(policy: Policy) -> Translation:
    """One of three formats for all that is quantized.

    Raises:
        BadInput: there are several, or none.
    """
    formats, losses = fit(policy, "bitsandbytes", _refusal, fused=False)
    used = list(dict.fromkeys(format.name for format in formats.values() if not format.exact))
    if len(used) != 1:
        first = [next(t for t, f in formats.items() if f.name == name) for name in used]
        named = ", ".join(f"{t} is {name}" for t, name in zip(first, used, strict=True))
        raise BadInput(f"bitsandbytes quantizes in one format, not {len(used)} ({named or 'none'})")
    if used[0] == _EIGHT:
        losses.append(Loss("ACT_QUANTIZED", "all", "16-bit inputs", "LLM.int8"))
    else:
        losses.append(Loss("SCALE_FORMAT_CHANGED", "all", "float16 scales", "float32 scales"))
    return Translation(formats, tuple(losses))


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why bitsandbytes does not hold a tensor in a format."""
    if format.exact:
        return ""
    if format.name not in (*_FOUR, _EIGHT):
        return f"it has {', '.join((*_FOUR, _EIGHT))} alone"
    if module.role == "embedding":
        return "embeddings stay at 16 bits"
    if not tensor.endswith(".weight"):
        return "stacked experts stay at 16 bits"
    if module.shape[1] % (format.group_size or 1):
        return f"its blocks of 64 would run over the end of rows of {module.shape[1]}"
    return ""


def write(
    policy: Policy, translation: Translation, folder: Path, _: Checkpoint | None
) -> Mapping[str, int]:
    """`quantization_config.json`."""
    formats = translation.formats
    used = next(format.name for format in formats.values() if not format.exact)
    tied = [name for names in policy.model.tied for name in names if name not in formats]
    skipped = [
        tensor.removesuffix(".weight")
        for tensor in (*(t for t, f in formats.items() if f.exact), *tied)
        if policy.modules.get(tensor) is None or policy.modules[tensor].role != "embedding"
    ]
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": used == _EIGHT,
        "load_in_4bit": used in _FOUR,
        "llm_int8_skip_modules": [*skipped, *policy.excluded],
    }
    if used in _FOUR:
        config |= {"bnb_4bit_quant_type": _FOUR[used], "bnb_4bit_use_double_quant": False}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return {}


def read(path: Path, layout: ModelLayout) -> Reading:
    """The formats of a configuration, or of a config.json.

    Raises:
        BadInput: it is neither.
    """
    config = read_json(path, CONFIG, "quantization_config")
    kinds = {value: name for name, value in _FOUR.items()}
    notes: tuple[str, ...]
    if config.get("load_in_8bit"):
        format, notes = parse_format(_EIGHT), ("activations are quantized",)
    elif config.get("load_in_4bit"):
        kind = str(config.get("bnb_4bit_quant_type", "fp4"))
        if kind not in kinds:
            raise BadInput(f"{path}: no format of ours is {kind}")
        format = parse_format(kinds[kind])
        double = config.get("bnb_4bit_use_double_quant")
        notes = ("scales are quantized themselves",) if double else ()
    else:
        raise BadInput(f"{path} is not of bitsandbytes")
    skipped = config.get("llm_int8_skip_modules") or ["lm_head"]
    formats = {
        matrix.name: format
        for unit in layout.units
        for matrix in unit.matrices
        if unit.kind != "embedding"
        and matrix.name.endswith(".weight")
        and not any(_skips(path, name, matrix.module) for name in skipped)
    }
    return Reading(formats, notes=notes)


def _skips(path: Path, pattern: str, module: str) -> bool:
    """How transformers 5.23 reads it: a pattern up to a point, or the end of the name."""
    try:
        return bool(re.match(rf"(?:{pattern})(?:\.|$)", module)) or module.endswith(pattern)
    except re.error as error:
        raise BadInput(f"{path}: '{pattern}' is no regular expression: {error}") from error


EXPORTER = Exporter(
    about="bitsandbytes 0.50 through transformers: 4 or 8 bits, and what is skipped",
    translate=translate,
    write=write,
    read=read,
    writes_weights=False,
)
