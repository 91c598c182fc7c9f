"""GPTQModel: its `dynamic` configuration, and GPTQ checkpoints that hold the measured codes.

Rules name modules in full, anchored at both ends. Engines match rules against the fused
names (`qkv_proj`, `gate_up_proj`) and never against their members, GPTQModel only against
the members: each rule stands for both. A skip (`-:`) beats every override, wherever it
stands, so a skip never covers more than one module.

Symmetric checkpoints are in the first version of the layout, the only one that vLLM and
SGLang take; with an asymmetric matrix anywhere, in the second, for GPTQModel alone.
transformers does not honour `dynamic`: it reads mixed checkpoints as uniform, and fails.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, save_checkpoint
from bitsearch.exporters.fit import checkpoint_bytes, fit, fused_sets
from bitsearch.exporters.gptq_layout import packing, refusal
from bitsearch.exporters.reading import read_integer
from bitsearch.formats import Format
from bitsearch.policy import Policy
from bitsearch.targets.stored import gptq as stored_bytes
from bitsearch.units import ModelLayout

CONFIG = "quantize_config.json"


def translate(policy: Policy) -> Translation:
    """Integers of 2, 3, 4 and 8 bits; fused sets in one format."""
    formats, losses = fit(policy, "gptqmodel", refusal, fused=True)
    size = checkpoint_bytes(policy, formats, stored_bytes)
    return Translation(formats, tuple(losses), size)


def quantize_config(policy: Policy, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The configuration: the most frequent format is the base, all else a rule."""
    linear = {
        tensor.removesuffix(".weight"): formats[tensor]
        for tensor, module in policy.modules.items()
        if module.role not in ("embedding", "head")
    }
    head = next((t for t, m in policy.modules.items() if m.role == "head"), None)
    quantized_head = head is not None and not formats[head].exact
    if head is not None and quantized_head:
        linear[head.removesuffix(".weight")] = formats[head]
    counted = Counter(format for format in linear.values() if not format.exact)
    if not counted:
        raise BadInput("nothing is quantized in this policy: gptqmodel has nothing to say")
    base = counted.most_common(1)[0][0]
    fused = {member: name for name, members in fused_sets(policy.modules) for member in members}
    dynamic: dict[str, dict[str, Any]] = {}
    for name, format in linear.items():
        if format == base:
            continue
        for known in dict.fromkeys([name, fused.get(f"{name}.weight", name)]):
            sign = "-" if format.exact else "+"
            dynamic[f"{sign}:^{re.escape(known)}$"] = {} if format.exact else _fields(format)
    for name in policy.excluded:
        dynamic[f"-:^{re.escape(name)}$"] = {}
    symmetric = all(format.symmetric for format in counted)
    return {
        "quant_method": "gptq",
        **_fields(base),
        "desc_act": False,
        "lm_head": quantized_head,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"bitsearch:{version('bitsearch')}"]},
    }


def _fields(format: Format) -> dict[str, Any]:
    """A format, always in full."""
    return {
        "bits": format.bits,
        "group_size": format.group_size or -1,
        "sym": format.symmetric,
    }


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """`quantize_config.json`, and a checkpoint."""
    config = quantize_config(policy, translation.formats)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if checkpoint is None:
        return {}
    first = config["checkpoint_format"] == "gptq"
    packed = packing(offset=1 if first else 0, group_index=True)
    return save_checkpoint(checkpoint, translation, packed, config, folder)


def read(path: Path, layout: ModelLayout) -> Reading:
    """The formats of a `quantize_config.json`, or of a config.json.

    Raises:
        BadInput: it is neither, or says what no policy can hold.
    """
    config = read_json(path, CONFIG, "quantization_config")
    if config.get("quant_method", "gptq") != "gptq":
        raise BadInput(f"{path} is not of GPTQModel")
    rules = list(_rules(path, config.get("dynamic") or {}))
    formats: dict[str, Format] = {}
    for unit in layout.units:
        if unit.kind == "embedding" or (unit.kind == "head" and not config.get("lm_head")):
            continue
        for matrix in unit.matrices:
            if not matrix.name.endswith(".weight"):
                continue
            found = next((f for pattern, f in rules if pattern.match(matrix.module)), {})
            if found is not None:
                formats[matrix.name] = read_integer(path, {**config, **found})
    notes = ["columns are quantized in another order (desc_act)"] if config.get("desc_act") else []
    return Reading(formats, notes=tuple(notes))


def _rules(
    path: Path, dynamic: Mapping[str, Any]
) -> Iterator[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """Rules in the order in which they count: skips, with None, come first."""
    ordered = sorted(dynamic.items(), key=lambda rule: not rule[0].startswith("-:"))
    for text, override in ordered:
        skips = text.startswith("-:")
        try:
            pattern = re.compile(text[2:] if text[:2] in ("-:", "+:") else text)
        except re.error as error:
            raise BadInput(f"{path}: '{text}' is no regular expression: {error}") from error
        if not skips and not isinstance(override, dict):
            raise BadInput(f"{path}: the rule '{text}' is no object")
        yield pattern, None if skips else override


EXPORTER = Exporter(
    about="GPTQModel 7.6 `dynamic` and GPTQ checkpoints, for GPTQModel, vLLM, SGLang",
    translate=translate,
    write=write,
    read=read,
)
