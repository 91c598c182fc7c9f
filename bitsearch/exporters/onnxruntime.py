"""ONNX Runtime: weights for MatMulNBits nodes, and a script that puts them into a graph.

bitsearch writes no graphs: Optimum, torch.onnx and onnxruntime-genai do, each with inputs
and caches of its own. `apply.py GRAPH.onnx OUT.onnx` (`bitsearch.exporters.onnx_apply`)
finds every quantized matrix in any of them by its values, and puts a MatMulNBits node with
the measured codes, scales and zero points in the place of its MatMul.

The operator takes 2, 4 or 8 bits in groups of 16 to 256, a power of two, with whole zero
points or none. Embeddings are looked up, not multiplied, and stay as they are; so does a
head that shares their weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.exporters import onnx_apply
from bitsearch.exporters.base import Checkpoint, Exporter, Reading, Translation
from bitsearch.exporters.checkpoints import read_json, tensor_bytes
from bitsearch.exporters.fit import fit
from bitsearch.formats import BF16, Format
from bitsearch.formats.integer import IntFormat
from bitsearch.policy import Policy, PolicyModule
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.codec import Encoded

SCRIPT = "apply.py"
_BITS, _GROUPS = (2, 4, 8), (16, 32, 64, 128, 256)
_ENGINE = "onnxruntime 1.32"


def translate(policy: Policy) -> Translation:
    """Integers that MatMulNBits takes."""
    formats, losses = fit(policy, "onnxruntime", _refusal, fused=False)
    size = sum(
        module.count * formats[name].bytes(*module.shape)
        for name, module in policy.modules.items()
        if not formats[name].exact
    )
    return Translation(formats, tuple(losses), size)


def _refusal(tensor: str, module: PolicyModule, format: Format) -> str:
    """Why the operator does not hold a tensor in a format."""
    if format.exact:
        return ""
    if not isinstance(format, IntFormat):
        return "only integers are multiplied by MatMulNBits"
    if module.role == "embedding":
        return "embeddings are looked up, not multiplied"
    if module.count > 1:
        return "stacked experts are not written"
    if format.bits not in _BITS:
        return f"MatMulNBits takes 2, 4 or 8 bits, not {format.bits}"
    if format.group_size not in _GROUPS:
        return "MatMulNBits takes groups of 16, 32, 64, 128 or 256"
    if module.shape[1] % format.group_size:
        return f"groups of {format.group_size} do not divide rows of {module.shape[1]}"
    return ""


def rules(policy: Policy, formats: Mapping[str, Format]) -> dict[str, Any]:
    """What each quantized matrix is, by its parameter's name."""
    return {
        name: {
            "bits": formats[name].bits,
            "block_size": formats[name].group_size,
            "symmetric": formats[name].symmetric,
            "shape": list(module.shape),
        }
        for name, module in policy.modules.items()
        if not formats[name].exact
    }


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """The rules; with weights, their codes and the script."""
    found = rules(policy, translation.formats)
    tensors: dict[str, Tensor] = {}
    if checkpoint is not None:
        for done, (name, rule) in enumerate(found.items()):
            checkpoint.progress("quantizing", done, len(found))
            matrix = checkpoint.matrices[name]
            weight = checkpoint.loaded.model.get_parameter(name).detach().float().cpu().numpy()
            rule["probe"] = onnx_apply.probe(weight.T if matrix.transposed else weight)
            (encoded,) = checkpoint.weights.quantized(matrix, translation.formats[name])
            tensors |= {f"{name}/{key}": value for key, value in packed(encoded).items()}
        checkpoint.progress("quantizing", len(found), len(found))
    described = {"engine": _ENGINE, "matrices": found}
    (folder / onnx_apply.RULES).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if checkpoint is None:
        return {}
    from safetensors.torch import save_file

    save_file(tensors, folder / onnx_apply.WEIGHTS)
    source = Path(onnx_apply.__file__).read_text(encoding="utf-8")
    (folder / SCRIPT).write_text(source, encoding="utf-8")
    return {onnx_apply.WEIGHTS: tensor_bytes(folder / onnx_apply.WEIGHTS)}


def packed(encoded: Encoded) -> dict[str, Tensor]:
    """The inputs of a MatMulNBits node.

    Returns:
        `codes`: (out, groups, bytes of a group) uint8, low bit first; `scales`:
        (out, groups) float16; `zeros`, if asymmetric: (out, bytes) uint8, low bit first.
    """
    found = encoded.pack()
    rows, groups = found["scales"].shape
    return found | {"codes": found["codes"].reshape(rows, groups, -1)}


def read(path: Path, layout: ModelLayout) -> Reading:
    """Formats from the rules, or from the MatMulNBits nodes of an ONNX file.

    Raises:
        BadInput: a file cannot be read, or a node is of no matrix of the model.
    """
    if path.suffix == ".onnx":
        nodes = onnx_apply.quantized_nodes(path)
    else:
        content = read_json(path, onnx_apply.RULES, "matrices")
        nodes = {name: (r["bits"], r["block_size"], r["symmetric"]) for name, r in content.items()}
    formats: dict[str, Format] = {m.name: BF16 for unit in layout.units for m in unit.matrices}
    for node, (bits, group, symmetric) in nodes.items():
        matching = [name for name in formats if _names(node, name)]
        if len(matching) != 1:
            raise BadInput(f"{path}: node {node} is of no matrix of {layout.reference}")
        if bits not in _BITS or not isinstance(group, int) or group < 1:
            raise BadInput(f"{path}: {node} has {bits} bits in groups of {group}")
        formats[matching[0]] = IntFormat("int", int(bits), group, bool(symmetric))
    return Reading(formats)


def _names(node: str, tensor: str) -> bool:
    """Whether a node is named after a parameter: its own name, or a path with slashes."""
    dotted = node.strip("/").replace("/", ".").replace(".attn.", ".self_attn.")
    module = tensor.removesuffix(".weight")
    return f".{module}." in f".{dotted}."


EXPORTER = Exporter(
    about="weights for MatMulNBits nodes, and a script that puts them into a graph "
    "(ONNX Runtime 1.32)",
    translate=translate,
    write=write,
    read=read,
)
