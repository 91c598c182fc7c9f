"""llama.cpp: a GGUF file, and the tensor types with which `llama-quantize` makes one.

Folder: `tensor_types.txt` for `llama-quantize --tensor-type-file`, `quantize.sh` with the
command; with weights also `model.gguf`, whose codes are those that were measured, while
`llama-quantize` rounds by its own methods.

`llama-quantize` searches each pattern, lower-cased, anywhere in a tensor's name, and the
first that is found counts; it ignores them all if the base type is not a quantized one.
Without `--pure` it edits what is not listed. So every tensor has a whole, anchored,
escaped name here, the base is Q8_0, and types whose blocks do not fill a row, for which it
would take another type or stop, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Type

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Reading, Translation
from bitsearch.exporters.gguf_file import ggml_type, holds, read_tensors, write_gguf
from bitsearch.exporters.gguf_names import Part, parts_of
from bitsearch.formats import Format, parse_format
from bitsearch.formats.gguf import BLOCKS
from bitsearch.policy import Policy
from bitsearch.units import ModelLayout

TYPES_FILE, COMMAND_FILE, GGUF_FILE = "tensor_types.txt", "quantize.sh", "model.gguf"
_BASE = "Q8_0"  # must be quantized; a block of 32 divides every row
# Integers whose scales ggml stores in another way: the type of the same width, and the one
# with blocks of 32 for rows that 256 does not divide.
_NEAREST: Mapping[int, tuple[str, str]] = {
    2: ("gguf-q2_k", "gguf-q4_0"),
    3: ("gguf-q3_k", "gguf-q4_0"),
    4: ("gguf-q4_k", "gguf-q4_1"),
    5: ("gguf-q5_k", "gguf-q5_1"),
    6: ("gguf-q6_k", "gguf-q8_0"),
    7: ("gguf-q8_0", "gguf-q8_0"),
    8: ("gguf-q8_0", "gguf-q8_0"),
}


def translate(policy: Policy) -> Translation:
    """The ggml type of every tensor.

    Raises:
        BadInput: no ggml type comes near a format, or a row is no whole number of blocks.
    """
    formats, losses = {}, []
    for name, module in policy.modules.items():
        wanted = parse_format(module.format)
        formats[name] = found = _held(name, wanted, module.shape[1])
        if found is not wanted:
            code = "SCALE_FORMAT_CHANGED" if found.bits == wanted.bits else "WIDTH_PROMOTED"
            losses.append(Loss(code, name, wanted.name, found.name))
    _parts(policy)
    stored = sum(
        module.count * formats[name].bytes(*module.shape) for name, module in policy.modules.items()
    )
    # Norms and biases, 16 bits in a policy, are float32 in a GGUF file.
    return Translation(formats, tuple(losses), stored + 2 * policy.achieved.kept_bytes)


def _held(name: str, format: Format, columns: int) -> Format:
    """The format itself if a ggml type holds it, or the nearest that one holds."""
    if not holds(format):
        if format.kind not in ("int", "affine"):
            raise BadInput(
                f"{name}: llama.cpp has no type for {format.name}; search with --target llama.cpp"
            )
        wide, narrow = _NEAREST[format.bits]
        format = parse_format(wide if columns % 256 == 0 else narrow)
    block, _ = gguf.GGML_QUANT_SIZES[ggml_type(format)]
    if columns % block:
        raise BadInput(
            f"{name}: rows of {columns} weights are no whole blocks of {block}, "
            f"which {format.name} needs in llama.cpp"
        )
    return format


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """Write the files; see the top of this module."""
    text = tensor_types(policy, translation.formats)
    (folder / TYPES_FILE).write_text(text, encoding="ascii")
    (folder / COMMAND_FILE).write_text(_command(), encoding="ascii")
    if checkpoint is None:
        return {}
    return {GGUF_FILE: write_gguf(folder / GGUF_FILE, translation.formats, checkpoint)}


def tensor_types(policy: Policy, formats: Mapping[str, Format]) -> str:
    """The lines of a tensor-type file, for everything that the policy decides.

    The rest (norms, biases, routers) `llama-quantize` never quantizes.

    Raises:
        BadInput: a tensor has a name that `llama-quantize` could not match.
    """
    lines = []
    for name, parts in _parts(policy).items():
        for part in parts:
            if part.name != part.name.lower() or part.name.split() != [part.name]:
                raise BadInput(f"llama-quantize cannot match the tensor name '{part.name}'")
            kind = ggml_type(formats[name]).name.lower()
            lines.append(f"^{re.escape(part.name)}$={kind}\n")
    return "".join(lines)


def _parts(policy: Policy) -> dict[str, tuple[Part, ...]]:
    """The GGUF tensors of everything that the policy decides."""
    blocks = 1 + max((m.block for m in policy.modules.values() if m.block is not None), default=0)
    return parts_of(policy.modules, policy.model.model_type, blocks)


def _command() -> str:
    """How `llama-quantize` uses the file."""
    return (
        "#!/bin/sh\n"
        "# usage: quantize.sh MODEL-F16.gguf MODEL-OUT.gguf\n"
        "# MODEL-F16.gguf: the unquantized model, by llama.cpp's convert_hf_to_gguf.py.\n"
        f"# The base type {_BASE} must stay a quantized one: with F16 no line of the file counts.\n"
        'exec llama-quantize --pure --tensor-type-file "$(dirname "$0")/'
        f'{TYPES_FILE}" "$1" "$2" {_BASE}\n'
    )


def read(path: Path, layout: ModelLayout) -> Reading:
    """Formats from the tensors of a GGUF file, or from a tensor-type file.

    Raises:
        BadInput: the file is damaged or of another model, a type is none of bitsearch's, or
            parts of one matrix differ.
    """
    if path.is_dir():
        path = path / (GGUF_FILE if (path / GGUF_FILE).exists() else TYPES_FILE)
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if path.suffix == ".gguf":
        tensors = {tensor.name: tensor for tensor in read_tensors(path)}
        _check_sizes(path, tensors, layout)
        types = {name: tensor.tensor_type for name, tensor in tensors.items()}
    else:
        wanted = [part.name for parts in _layout_parts(layout).values() for part in parts]
        types = listed_types(path.read_text(encoding="utf-8"), str(path), wanted)
    return formats_of(types, layout, str(path))


def listed_types(text: str, where: str, names: Iterable[str]) -> dict[str, Type]:
    """The type that a tensor-type file gives each tensor, as `llama-quantize` searches it.

    Raises:
        BadInput: a word is no pattern with a type.
    """
    rules = []
    for word in text.split():
        pattern, _, kind = word.partition("=")
        try:
            rules.append((re.compile(pattern.lower()), Type[kind.upper()]))
        except (KeyError, re.error) as error:
            raise BadInput(f"{where}: '{word}' is not PATTERN=TYPE ({error})") from error
    found = {}
    for name in names:
        matching = [kind for rule, kind in rules if rule.search(name)]
        if matching:
            found[name] = matching[0]
    return found


def formats_of(types: Mapping[str, Type], layout: ModelLayout, where: str) -> Reading:
    """The format of every matrix from the types of tensors.

    Raises:
        BadInput: a type is missing or none of bitsearch's, or parts of one matrix differ.
    """
    matrices = {m.name: m for unit in layout.units for m in unit.matrices}
    formats, notes = {}, []
    for name, parts in _layout_parts(layout).items():
        kinds = {_known(types, part.name, where) for part in parts}
        if len(kinds) > 1:
            raise BadInput(f"{where}: the halves of {name} have different types, {sorted(kinds)}")
        kind = kinds.pop()
        formats[name] = _format(kind, name, matrices[name].in_features, where)
        if kind == "F32":
            notes.append(f"{name} is F32 there and bf16 in the policy")
    return Reading(formats, "rtn", tuple(notes))


def _check_sizes(path: Path, tensors: Mapping[str, gguf.ReaderTensor], layout: ModelLayout) -> None:
    """Refuse a file whose tensors have other sizes than the model's."""
    matrices = {m.name: m for unit in layout.units for m in unit.matrices}
    for name, parts in _layout_parts(layout).items():
        for part in parts:
            found = tensors.get(part.name)
            if found is not None and found.n_elements * len(parts) != matrices[name].parameters:
                raise BadInput(
                    f"{path}: {part.name} has {found.n_elements} weights; is it of another model?"
                )


def _layout_parts(layout: ModelLayout) -> dict[str, tuple[Part, ...]]:
    names = [matrix.name for unit in layout.units for matrix in unit.matrices]
    return parts_of(names, layout.model_type, len(layout.blocks))


def _known(types: Mapping[str, Type], name: str, where: str) -> str:
    if name not in types:
        raise BadInput(f"{where} says nothing of {name}; is it of another model?")
    return types[name].name


def _format(kind: str, name: str, columns: int, where: str) -> Format:
    """The format of a ggml type."""
    plain = {"F32": "bf16", "BF16": "bf16", "F16": "fp16"}
    found = plain.get(kind, f"gguf-{kind.lower()}")
    if kind not in plain and found not in BLOCKS:
        raise BadInput(f"{where}: {name} is {kind}, which bitsearch has no format for")
    format = parse_format(found)
    if not format.fits(columns):
        raise BadInput(f"{where}: {kind} cannot hold {name}, whose rows have {columns} weights")
    return format


EXPORTER = Exporter(
    about="a GGUF file, and tensor types for llama-quantize (llama.cpp, October 2026)",
    translate=translate,
    write=write,
    read=read,
)
