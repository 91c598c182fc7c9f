"""HQQ, the library: one configuration for each type of layer.

`hqq_config.json` goes to `AutoHQQHFModel.quantize_model(quant_config=…)`. Its keys are
layer types (`self_attn.q_proj`): HQQ ignores a key with a block's index and leaves the
layer as it is. Layers of one type therefore take the largest format among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Translation
from bitsearch.exporters.fit import fit
from bitsearch.formats import Format, parse_format
from bitsearch.formats.affine import AffineFormat
from bitsearch.formats.integer import IntFormat
from bitsearch.policy import Policy, PolicyModule

CONFIG = "hqq_config.json"
BITS = (1, 2, 3, 4, 5, 6, 8)


def translate(policy: Policy) -> Translation:
    """Integers with float zero points, the same in every block."""
    formats, losses = fit(policy, "hqq", _refusal, fused=False)
    for tensor, format in formats.items():
        if isinstance(format, IntFormat):
            formats[tensor] = parse_format(f"{format.name.removesuffix('-sym')}-fz")
            losses.append(Loss("SCALE_FORMAT_CHANGED", tensor, format.name, formats[tensor].name))
    for tensors in _types(policy).values():
        shape = policy.modules[tensors[0]].shape
        largest = max((formats[t] for t in tensors), key=lambda f: f.bytes(*shape))
        for tensor in tensors:
            if formats[tensor] != largest:
                losses.append(Loss("LAYER_COLLAPSED", tensor, formats[tensor].name, largest.name))
                formats[tensor] = largest
    return Translation(formats, tuple(losses))


def _types(policy: Policy) -> dict[str, list[str]]:
    """Tensors by the type of their layer: what follows the block's index."""
    found: dict[str, list[str]] = {}
    for tensor, module in policy.modules.items():
        if module.block is not None:
            kind = tensor.removesuffix(".weight").partition(f".{module.block}.")[2]
            found.setdefault(kind, []).append(tensor)
    return found


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why HQQ does not hold a tensor in a format."""
    if format.exact:
        return ""
    if module.block is None:
        return "embedding and head stay at 16 bits"
    if not isinstance(format, IntFormat | AffineFormat) or format.bits not in BITS:
        return f"only integers of {', '.join(map(str, BITS))} bits are held"
    if not tensor.endswith(".weight"):
        return "stacked experts stay at 16 bits"
    size = format.group_size
    if size is not None and (module.shape[1] % size or size % 8):
        return f"groups of {size} do not divide rows of {module.shape[1]}, or are no multiple of 8"
    return ""


def write(
    policy: Policy, translation: Translation, folder: Path, _: Checkpoint | None
) -> Mapping[str, int]:
    """`hqq_config.json`."""
    config = dict(_configured(policy, translation.formats))
    if not config:
        raise BadInput("nothing is quantized in this policy: hqq has nothing to say")
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return {}


def _configured(
    policy: Policy, formats: Mapping[str, Format]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """By layer type, what `hqq.core.quantize.BaseQuantizeConfig` returns."""
    for kind, tensors in _types(policy).items():
        format = formats[tensors[0]]
        if not format.exact:
            weights = {
                "nbits": format.bits,
                "channel_wise": True,
                "group_size": format.group_size,
                "optimize": True,
                "round_zero": False,
                "axis": 1,
                "view_as_float": False,
            }
            rest = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
            yield kind, {"weight_quant_params": weights, **rest}


EXPORTER = Exporter(
    about="HQQ 0.2.8, the library: one format for each type of layer",
    translate=translate,
    write=write,
    writes_weights=False,
)
