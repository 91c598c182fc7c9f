"""AutoRound: its `layer_config`, and checkpoints that hold the measured codes.

Every module has an entry of its own with all fields: vLLM takes an entry without `bits`,
as AutoRound itself writes them, for an unquantized module. What stays at 16 bits has
`bits` 16.

Checkpoints are packed as `auto_round:auto_gptq`, which vLLM and SGLang take; with an
asymmetric matrix anywhere as `auto_round`, for transformers with auto-round alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, save_checkpoint
from bitsearch.exporters.fit import checkpoint_bytes, fit
from bitsearch.exporters.gptq_layout import packing, refusal
from bitsearch.exporters.reading import read_integer
from bitsearch.formats import Format
from bitsearch.policy import Policy
from bitsearch.targets.stored import autoround as stored_bytes
from bitsearch.units import ModelLayout

LAYERS, CONFIG = "layer_config.json", "quantization_config.json"
_PATTERN = set(r"*+?^$()[]{}|\\")


def translate(policy: Policy) -> Translation:
    """Integers of 2, 3, 4 and 8 bits; fused sets in one format."""
    formats, losses = fit(policy, "autoround", refusal, fused=True)
    size = checkpoint_bytes(policy, formats, stored_bytes)
    return Translation(formats, tuple(losses), size)


def layer_config(policy: Policy, formats: Mapping[str, Format]) -> dict[str, dict[str, Any]]:
    """An entry for every linear layer, as `AutoRound(layer_config=…)` takes it."""
    found = {
        tensor.removesuffix(".weight"): _fields(formats[tensor])
        for tensor, module in policy.modules.items()
        if module.role != "embedding"
    }
    return found | {name: _fields(None) for name in policy.excluded}


def _fields(format: Format | None) -> dict[str, Any]:
    """A format, always in full."""
    if format is None or format.exact:
        return {"bits": 16, "group_size": -1, "sym": True, "data_type": "float"}
    return {
        "bits": format.bits,
        "group_size": format.group_size or -1,
        "sym": format.symmetric,
        "data_type": "int",
    }


def quantization_config(policy: Policy, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    quantized = [format for format in formats.values() if not format.exact]
    if not quantized:
        raise BadInput("nothing is quantized in this policy: autoround has nothing to say")
    blocks = {
        tensor.partition(f".{module.block}.")[0]
        for tensor, module in policy.modules.items()
        if module.block is not None
    }
    symmetric = all(format.symmetric for format in quantized)
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        **_fields(Counter(quantized).most_common(1)[0][0]),
        "act_bits": 16,
        "block_name_to_quantize": ",".join(sorted(blocks)),
        "extra_config": layer_config(policy, formats),
        "provider": f"bitsearch {version('bitsearch')}",
    }


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """`layer_config.json` for AutoRound, or a checkpoint."""
    if checkpoint is None:
        layers = layer_config(policy, translation.formats)
        (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
        return {}
    config = quantization_config(policy, translation.formats)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    offset = 1 if config["packing_format"] == "auto_round:auto_gptq" else 0
    return save_checkpoint(
        checkpoint, translation, packing(offset, group_index=False), config, folder
    )


def read(path: Path, layout: ModelLayout) -> Reading:
    """The formats of a checkpoint of AutoRound, or of a `layer_config.json`.

    Raises:
        BadInput: it is neither, or says what no policy can hold.
    """
    alone = LAYERS if path.is_dir() and (path / LAYERS).is_file() else CONFIG
    config = read_json(path, alone, "quantization_config")
    if "quant_method" not in config:
        config = {"bits": 16, "extra_config": config}
    elif config["quant_method"] != "auto-round":
        raise BadInput(f"{path} is not of AutoRound")
    fields = ("bits", "group_size", "sym", "data_type")
    base: dict[str, Any] = {key: config[key] for key in fields if key in config}
    entries: Mapping[str, Any] = config.get("extra_config") or {}
    inside = config.get("block_name_to_quantize") or [
        block.rpartition(".")[0] for block in layout.blocks
    ]
    prefixes = tuple(inside.split(",") if isinstance(inside, str) else inside)
    formats: dict[str, Format] = {}
    for unit in layout.units:
        for matrix in unit.matrices:
            entry = _entry(path, entries, matrix.module)
            if entry is not None and matrix.name.endswith(".weight"):
                formats[matrix.name] = read_integer(path, {**base, **entry})
            elif unit.block is not None and matrix.module.startswith(prefixes):
                formats[matrix.name] = read_integer(path, base)
    notes = ["activations are quantized"] if (config.get("act_bits") or 16) < 16 else []
    return Reading(formats, notes=tuple(notes))


def _entry(path: Path, entries: Mapping[str, Any], module: str) -> dict[str, Any] | None:
    """What is said of a module: by its name, or by the first pattern found in it."""
    found = entries.get(module)
    if found is None:
        for text, entry in entries.items():
            try:
                if _PATTERN & set(text) and re.search(text, module):
                    found = entry
                    break
            except re.error as error:
                raise BadInput(f"{path}: '{text}' is no regular expression: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise BadInput(f"{path}: what is said of {module} is no object")
    return found


EXPORTER = Exporter(
    about="AutoRound 0.16 `layer_config` and checkpoints, for transformers, vLLM, SGLang",
    translate=translate,
    write=write,
    read=read,
)
