"""torchao through transformers: `FqnToConfig` by full names, and checkpoints.

torchao stores every width in one byte a weight: its checkpoints are for checking and for
what is exported from them, not for saving space. `bitsearch search --target torchao`
counts those bytes. The codes, zero points and float16 scales in the file are the measured
ones; transformers gives the scales the dtype that the model is opened in, and in float32
the weights are exactly those measured.

Fused names stand beside their members, because vLLM looks for nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, save_checkpoint
from bitsearch.exporters.fit import checkpoint_bytes, fit, fused_sets, linear_refusal
from bitsearch.formats import BF16, Format
from bitsearch.formats.integer import INT_BITS, IntFormat
from bitsearch.policy import Policy, PolicyModule
from bitsearch.targets.stored import torchao as stored_bytes
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.quantized import Quantized

CONFIG = "quantization_config.json"
_DEFAULT = "_default"


def translate(policy: Policy) -> Translation:
    """Integers of whole groups; fused sets in one format."""
    formats, losses = fit(policy, "torchao", _refusal, fused=True)
    size = checkpoint_bytes(policy, formats, stored_bytes)
    return Translation(formats, tuple(losses), size)


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why torchao does not hold a tensor in a format."""
    if format.exact:
        return ""
    if not isinstance(format, IntFormat):
        return "only integers are written"
    return linear_refusal(tensor, module, format)


def quantization_config(policy: Policy, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` of config.json, as transformers 5.23 writes it."""
    names = {
        tensor.removesuffix(".weight"): format
        for tensor, format in formats.items()
        if not format.exact
    }
    for fused, members in fused_sets(formats):
        if not formats[members[0]].exact:
            names[fused] = formats[members[0]]
    table = {"fqn_to_config": {name: _workflow(format) for name, format in names.items()}}
    head = any(policy.modules[t].role == "head" and not f.exact for t, f in formats.items())
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "FqnToConfig", "_version": 1, "_data": table}},
        "include_input_output_embeddings": head,
        "modules_to_not_convert": None,
        "untie_embedding_weights": False,
    }


def _workflow(format: Format) -> dict[str, Any]:
    """The configuration of `IntxWeightOnlyConfig`."""
    granularity = (
        {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
        if format.group_size is None
        else {"_type": "PerGroup", "_version": 1, "_data": {"group_size": format.group_size}}
    )
    mapping = "SYMMETRIC" if format.symmetric else "ASYMMETRIC"
    return {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{format.bits}"},
            "granularity": granularity,
            "mapping_type": {"_type": "MappingType", "_data": mapping},
            "scale_dtype": None,
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            "intx_choose_qparams_algorithm": {
                "_type": "IntxChooseQParamsAlgorithm",
                "_data": "AFFINE",
            },
        },
    }


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """`quantization_config.json`, or a checkpoint."""
    config = quantization_config(policy, translation.formats)
    if checkpoint is None:
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return {}
    header: dict[str, str] = {}
    for tensor, format in translation.formats.items():
        header[tensor] = json.dumps(_header(policy, tensor, format, checkpoint.dtype))
    kept = [name for name in checkpoint.loaded.layout.kept if name not in header]
    header |= dict.fromkeys(kept, json.dumps({"_type": "Tensor"}))
    header["tensor_names"] = json.dumps(list(header))
    return save_checkpoint(checkpoint, translation, packed, config, folder, header)


def _header(policy: Policy, tensor: str, format: Format, dtype: str) -> dict[str, Any]:
    """What the file's header says of a tensor."""
    if format.exact:
        return {"_type": "Tensor"}
    return {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": {"_type": "torch.dtype", "_data": f"int{format.bits}"},
            "block_size": [1, format.group_size or policy.modules[tensor].shape[1]],
            "dtype": {"_type": "torch.dtype", "_data": dtype},
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }


def packed(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The stored tensors of a matrix; codes and zero points are centred at zero."""
    import torch

    middle = 2 ** (quantized.format.bits - 1)

    def centred(values: Tensor) -> Tensor:
        found: Tensor = (values.cpu().to(torch.int16) - middle).to(torch.int8)
        return found

    return {
        f"{name}._weight_qdata": centred(quantized.codes),
        f"{name}._weight_scale": quantized.scales.cpu().contiguous(),
        f"{name}._weight_zero_point": centred(quantized.zeros),
    }


def read(path: Path, layout: ModelLayout) -> Reading:
    """The formats of a checkpoint, its config.json, or of `quantization_config.json`.

    Raises:
        BadInput: it is none of these, or says what no policy can hold.
    """
    config = read_json(path, CONFIG, "quantization_config")
    if config.get("quant_method") != "torchao":
        raise BadInput(f"{path} is not of torchao")
    try:
        default = config["quant_type"]["default"]
        table = default["_data"]["fqn_to_config"] if "FqnToConfig" in default["_type"] else None
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path}: its quant_type cannot be read: no {error}") from error
    table = {_DEFAULT: default} if table is None else table
    formats: dict[str, Format] = {}
    ends = bool(config.get("include_input_output_embeddings"))
    for unit in layout.units:
        for matrix in unit.matrices:
            known = (matrix.name, matrix.module)
            named = next((name for name in known if name in table), None)
            pattern = next((key for key in table if _matches(path, key, known)), None)
            key = named or pattern or (_DEFAULT if unit.block is not None or ends else None)
            if key in table and table[key] is not None:
                formats[matrix.name] = _read_workflow(path, table[key])
    return Reading({name: f for name, f in formats.items() if f != BF16})


def _matches(path: Path, key: str, names: tuple[str, ...]) -> bool:
    """Whether a key of torchao's table is a pattern that fits a whole name."""
    try:
        return key.startswith("re:") and any(re.fullmatch(key[3:], name) for name in names)
    except re.error as error:
        raise BadInput(f"{path}: '{key}' is no regular expression: {error}") from error


def _read_workflow(path: Path, config: dict[str, Any]) -> Format:
    """A format from the configuration of `IntxWeightOnlyConfig`."""
    try:
        kind, data = config["_type"], config["_data"]
        bits = int(str(data["weight_dtype"]["_data"]).removeprefix("int"))
        grain = data["granularity"]
        group = int(grain["_data"]["group_size"]) if grain["_type"] == "PerGroup" else None
        symmetric = str(data["mapping_type"]["_data"]).startswith("SYMMETRIC")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: {config.get('_type')} is no format of ours") from error
    if kind != "IntxWeightOnlyConfig" or bits not in INT_BITS:
        raise BadInput(f"{path}: {bits} bits of {kind} are no format of ours")
    return IntFormat("int", bits, group, symmetric)


EXPORTER = Exporter(
    about="torchao 0.18 `FqnToConfig` and checkpoints, for transformers 5.23",
    translate=translate,
    write=write,
    read=read,
)
