"""MLX: a folder that mlx-lm loads, or a script that quantizes with mlx-lm.

MLX stores a scale and a bias for each group of 32, 64 or 128 weights, w = scale · code +
bias: the codes and constants of `int4-g64-fz` and its kin are written as they are, and
those of symmetric integers too, with bias −scale · 2^(bits−1), which float16 holds exactly
and which takes two bytes a group more.
Whole zero points of other integers have no such bias; those matrices are quantized again
with a float one. MLX has no 7 bits. Microscaling blocks are stored as they are.

mlx-lm 0.32 reads `rope_theta`, which transformers 5 no longer writes, and takes 10,000 in
its absence without a word; it is written here, and the script stops where it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput, OutOfResources
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, tensor_bytes
from bitsearch.formats import BF16, Format, parse_format
from bitsearch.formats.affine import AffineFormat
from bitsearch.formats.integer import IntFormat
from bitsearch.policy import Policy
from bitsearch.targets.stored import mlx as stored_bytes
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.codec import Encoded

# Whose configuration mlx-lm 0.32 was seen to read rightly, as written here.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
RULES, SCRIPT = "quantization.json", "convert.py"
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
_BLOCKS = {"mxfp4": (32, 4), "mxfp8": (32, 8)}
# Of modules that no entry names. mlx-lm passes over a module whose rows the global group
# does not divide, whatever its own entry says: the smallest group divides all.
_GLOBAL = {"group_size": 32, "bits": 4, "mode": "affine"}


def translate(policy: Policy) -> Translation:
    """The format that MLX stores for every tensor.

    Raises:
        BadInput: mlx-lm's model of this type was not seen to work, or a format is none of
            MLX's and no integer.
    """
    if policy.model.model_type not in FAMILIES:
        raise BadInput(
            f"model type '{policy.model.model_type}' is not written for MLX here; "
            f"known: {', '.join(FAMILIES)}"
        )
    formats: dict[str, Format] = {}
    losses: list[Loss] = []
    size = policy.achieved.kept_bytes
    for name, module in policy.modules.items():
        wanted = parse_format(module.format)
        formats[name] = found = _held(name, wanted, module.shape[1])
        losses += _losses(name, wanted, found)
        size += module.count * stored_bytes(*module.shape, found)
    return Translation(formats, tuple(losses), size)


def _held(name: str, format: Format, columns: int) -> Format:
    """The format itself where MLX can hold its values, else the nearest that it holds."""
    if format.exact:
        return format
    if columns % 32:
        raise BadInput(f"{name}: MLX stores groups of 32, which do not divide rows of {columns}")
    if format.name in _BLOCKS:
        return format
    if not isinstance(format, IntFormat | AffineFormat):
        raise BadInput(f"{name}: MLX has no {format.name}; search with --target mlx")
    wanted = format.group_size or columns
    group = next((g for g in _GROUPS if g <= wanted and columns % g == 0), 32)
    bits = next(bits for bits in _BITS if bits >= format.bits)
    if format.symmetric:
        return IntFormat("int", bits, group, True)
    return AffineFormat("affine", bits, group, False)


def _losses(name: str, wanted: Format, found: Format) -> Iterator[Loss]:
    """What is lost; one for each thing that changed."""
    if found.bits != wanted.bits:
        yield Loss("WIDTH_PROMOTED", name, wanted.name, found.name)
    if found.group_size != wanted.group_size:
        yield Loss("GROUP_COERCED", name, wanted.name, found.name)
    if found.kind != wanted.kind:
        yield Loss("SCALE_FORMAT_CHANGED", name, wanted.name, found.name)


def rules(policy: Policy, formats: Mapping[str, Format]) -> dict[str, Any]:
    """`quantization` of config.json: every module by name, False where it stays as it is."""
    found: dict[str, Any] = dict(_GLOBAL)
    for name in policy.modules:
        format = formats[name]
        module = name.removesuffix(".weight")
        mode = format.name if format.name in _BLOCKS else "affine"
        found[module] = not format.exact and {
            "group_size": format.group_size,
            "bits": format.bits,
            "mode": mode,
        }
    return found


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """The checkpoint, or the rules and a script."""
    found = rules(policy, translation.formats)
    if checkpoint is None:
        (folder / RULES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / SCRIPT).write_text(_SCRIPT, encoding="utf-8")
        return {}
    config = mlx_config(checkpoint.loaded.model.config)
    config |= {"dtype": "float16", "quantization": found, "quantization_config": found}
    tensors = dict(_tensors(checkpoint, translation))
    _save(tensors, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    model: Any = checkpoint.loaded.model
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    checkpoint.loaded.tokenizer.save_pretrained(folder)
    return {file.name: tensor_bytes(file) for file in sorted(folder.glob("*.safetensors"))}


def mlx_config(config: Any) -> dict[str, Any]:
    """A configuration with the names that mlx-lm reads.

    Raises:
        BadInput: it has no name for something that matters.
    """
    found: dict[str, Any] = config.to_dict()
    rope = found.get("rope_parameters") or {}
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        rope = rope["full_attention"]
        found["rope_local_base_freq"] = local["rope_theta"]
        layers = found["layer_types"]
        period = layers.index("full_attention") + 1
        expected = [
            "sliding_attention" if (i + 1) % period else "full_attention"
            for i in range(len(layers))
        ]
        if layers != expected or local["rope_type"] != "default":
            raise BadInput("mlx-lm has one full layer in every so many, and no other pattern")
        found["sliding_window_pattern"] = period
    if "rope_theta" not in rope:
        raise BadInput("the configuration has no rope_theta, which mlx-lm reads")
    found["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        found["rope_scaling"] = {key: v for key, v in rope.items() if key != "rope_theta"}
    return found


def _tensors(checkpoint: Checkpoint, translation: Translation) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor by name."""
    import torch

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for done, (name, matrix) in enumerate(checkpoint.matrices.items()):
        checkpoint.progress("quantizing", done, len(checkpoint.matrices))
        format = translation.formats[name]
        if format.exact:
            value = checkpoint.weights.reference(matrix).to("cpu", types[format.kind])
            yield name, value.contiguous()
        else:
            (encoded,) = checkpoint.weights.quantized(matrix, format)
            for key, tensor in packed(name, encoded).items():
                yield f"{matrix.module}.{key}", tensor
    checkpoint.progress("quantizing", len(checkpoint.matrices), len(checkpoint.matrices))
    for name in checkpoint.loaded.layout.kept:
        value = checkpoint.loaded.model.get_parameter(name).detach().to("cpu")
        half = value.to(torch.float16)
        # One dtype all through, so that MLX computes in it; what is beyond keeps its own.
        kept = half if half.isfinite().all() else value.to(torch.bfloat16)
        yield name, kept.contiguous()


def packed(name: str, encoded: Encoded) -> dict[str, Tensor]:
    """`weight`, `scales` and `biases` of a matrix.

    Raises:
        BadInput: a bias is beyond float16.
    """
    import torch

    parts = encoded.pack()
    found = {
        # low bit first, and rows of whole words: 32 weights of any width are
        "weight": parts["codes"].contiguous().view(torch.uint32),
        "scales": parts["scales"],
    }
    if encoded.format.name in _BLOCKS:
        return found
    found["biases"] = parts.get("biases", parts["scales"] * -(2 ** (encoded.format.bits - 1)))
    if not found["biases"].isfinite().all():
        raise BadInput(f"{name} has scales whose bias is beyond float16 in MLX; keep it at 16 bits")
    return found


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(tensors, folder, metadata={"format": "mlx"})
    except RuntimeError as error:  # safetensors' own errors are not OSErrors
        raise OutOfResources(f"cannot write {folder}: {error}") from error


def read(path: Path, layout: ModelLayout) -> Reading:
    """Formats from `quantization` of a folder's config.json, or from a file of rules.

    A module that no entry names is quantized if the folder's weights have scales for it.

    Raises:
        BadInput: an entry is none of MLX's modes, or none of bitsearch's formats.
    """
    found = read_json(path, RULES, "quantization")
    stored = _stored_names(path)
    formats: dict[str, Format] = {}
    notes = []
    for unit in layout.units:
        for matrix in unit.matrices:
            entry = found.get(matrix.module)
            if entry is None and stored is not None:
                entry = f"{matrix.module}.scales" in stored
            if isinstance(entry, dict):
                formats[matrix.name] = _format({**found, **entry}, matrix.name, path)
            elif entry is None or entry:
                formats[matrix.name] = _format(found, matrix.name, path)
            else:
                formats[matrix.name] = BF16
            format = formats[matrix.name]
            if matrix.in_features % (format.group_size or 1):
                raise BadInput(f"{path}: groups do not divide the rows of {matrix.name}")
            if format.kind == "nvfp4":
                notes.append(f"{matrix.name} has no scale of the whole matrix in MLX")
    return Reading(formats, "rtn", tuple(notes))


def _stored_names(path: Path) -> set[str] | None:
    """Names of the tensors beside a configuration; None if there are none."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                names |= set(opened.keys())
        except SafetensorError as error:
            raise BadInput(f"{file} is damaged: {error}") from error
    return names if files else None


def _format(entry: Mapping[str, Any], name: str, path: Path) -> Format:
    """The format of one entry."""
    bits, group, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
    if mode == "affine" and bits in _BITS and group in _GROUPS:
        return AffineFormat("affine", int(bits), int(group), False)
    if mode in _BLOCKS and (group, bits) == _BLOCKS[mode]:
        return parse_format(mode)
    if mode == "nvfp4" and (group, bits) == (16, 4):
        return parse_format("nvfp4")
    raise BadInput(f"{path}: {name} is {bits}-bit {mode} in groups of {group}, no format of ours")


_SCRIPT = '''"""Quantize a model with mlx-lm by the rules beside this file: convert.py MODEL OUT"""

import json
import sys
from pathlib import Path

from mlx_lm import convert

model, out = sys.argv[1:]
rules = json.loads((Path(__file__).parent / "quantization.json").read_text())
config = Path(model) / "config.json"
if config.is_file() and "rope_theta" not in json.loads(config.read_text()):
    sys.exit(f"{config} has no rope_theta, and mlx-lm would take 10000: add the model's own")
convert(
    model,
    out,
    quantize=True,
    q_group_size=rules["group_size"],  # divides every row, or mlx-lm skips a module
    q_bits=rules["bits"],
    quant_predicate=lambda path, module: rules[path],
)
'''

EXPORTER = Exporter(
    about="a folder for mlx-lm 0.32 (MLX 0.32), or rules for its convert",
    translate=translate,
    write=write,
    read=read,
)
