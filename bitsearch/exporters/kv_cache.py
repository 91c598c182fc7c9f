"""Settings of KV caches: what a policy says of K and V in each layer, for two engines.

vLLM has one dtype for all layers, and a list of those that stay at 16 bits. transformers
has caches of its own for each layer, in which K and V take one width. A policy that says
nothing of the cache has nothing to export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Translation
from bitsearch.formats import Format, parse_format
from bitsearch.policy import Policy

CONFIG = "kv_cache.json"

_VLLM = {
    "fp8": "fp8",
    "fp8-e5m2": "fp8_e5m2",
    "int8-row-sym": "int8_per_token_head",
    "int4-row-sym": "int4_per_token_head",
    "nvfp4": "nvfp4",
}
_WIDTHS = (2, 4, 8)


def _layers(policy: Policy) -> dict[str, tuple[Format, Format]]:
    """Formats of K and V by layer.

    Raises:
        BadInput: the policy says nothing of the cache.
    """
    if not policy.kv_cache:
        raise BadInput("this policy says nothing of the KV cache: there is nothing to export")
    return {
        layer: (parse_format(said["k"]), parse_format(said["v"]))
        for layer, said in policy.kv_cache.items()
    }


def _merged(
    policy: Policy, target: str, held: Callable[[Format], bool]
) -> tuple[dict[str, Format], list[Loss]]:
    """One format for K and V of each layer: the wider."""
    found, losses = {}, []
    for layer, (k, v) in _layers(policy).items():
        for format in (k, v):
            if not format.exact and not held(format):
                raise BadInput(f"layer {layer} has {format.name} in its cache, {target} has not")
        wide = max(k, v, key=lambda format: format.bits)
        if k != v:
            losses.append(Loss("KV_KV_MERGED", f"layer {layer}", f"{k.name}, {v.name}", wide.name))
        found[layer] = wide
    return found, losses


def _own(policy: Policy) -> dict[str, Format]:
    return {tensor: policy.format_of(tensor) for tensor in policy.modules}


def _vllm(policy: Policy) -> tuple[dict[str, Format], list[Loss]]:
    """All layers in the widest format among them, but for those at 16 bits."""
    found, losses = _merged(policy, "vllm-kv", lambda format: format.name in _VLLM)
    quantized = [format for format in found.values() if not format.exact]
    wide = max(quantized, key=lambda format: format.bits, default=None)
    for layer, format in found.items():
        if wide is not None and format != wide and not format.exact:
            losses.append(Loss("KV_LAYER_COLLAPSED", f"layer {layer}", format.name, wide.name))
            found[layer] = wide
    return found, losses


def _write_vllm(policy: Policy, _: Translation, folder: Path, __: Checkpoint | None) -> Any:
    """Engine arguments."""
    found, _losses = _vllm(policy)
    used = next((format for format in found.values() if not format.exact), None)
    kept = [layer for layer, format in found.items() if format.exact]
    arguments = {
        "kv_cache_dtype": "auto" if used is None else _VLLM[used.name],
        **({"kv_cache_dtype_skip_layers": kept} if kept and used is not None else {}),
    }
    return _save(folder, arguments)


def _transformers(policy: Policy) -> tuple[dict[str, Format], list[Loss]]:
    return _merged(
        policy, "transformers-kv", lambda format: format.kind == "int" and format.bits in _WIDTHS
    )


def _write_transformers(
    policy: Policy, _: Translation, folder: Path, __: Checkpoint | None
) -> Mapping[str, int]:
    """Of each layer, what `HQQQuantizedLayer` is given; null for a `DynamicLayer`."""
    found, _losses = _transformers(policy)
    layers = [
        None
        if format.exact
        else {"nbits": format.bits, "q_group_size": format.group_size or 64, "axis_key": 1,
              "axis_value": 1}
        for _, format in sorted(found.items(), key=lambda item: int(item[0]))
    ]  # fmt: skip
    return _save(folder, {"backend": "hqq", "layers": layers})


def _save(folder: Path, content: Mapping[str, Any]) -> Mapping[str, int]:
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {}


VLLM = Exporter(
    about="vLLM 0.32: kv_cache_dtype, and the layers that are skipped",
    translate=lambda policy: Translation(_own(policy), tuple(_vllm(policy)[1])),
    write=_write_vllm,
    writes_weights=False,
)
TRANSFORMERS = Exporter(
    about="transformers 5.23: a quantized cache layer for each layer",
    translate=lambda policy: Translation(_own(policy), tuple(_transformers(policy)[1])),
    write=_write_transformers,
    writes_weights=False,
)
