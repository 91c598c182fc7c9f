"""ExLlamaV3: the uniform models that a mixed one is put together from, and how.

EXL3 has one whole width for each matrix. Its recompile tool takes every matrix from one of
several quantized models, by `overrides.yaml`; `convert.sh` makes those models, one for each
width, and the mixed one. The files are configuration alone: EXL3 quantizes again, by its
own trellis, and only on a GPU. A key of the file matches whole names of tensors, `*` any
text, so each names one module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Checkpoint, Exporter, Loss, Translation
from bitsearch.formats import BF16, Format, parse_format
from bitsearch.policy import Policy

OVERRIDES, SCRIPT = "overrides.yaml", "convert.sh"
_HEAD_BITS = 6  # of the convert tool, where a tied head has no format of its own


def translate(policy: Policy) -> Translation:
    """The width of every matrix; all are quantized again.

    Raises:
        BadInput: a matrix is kept at 16 bits, which EXL3 does not do.
    """
    formats: dict[str, Format] = {}
    losses = []
    for name, module in policy.modules.items():
        formats[name] = format = parse_format(module.format)
        if module.role == "embedding":
            formats[name] = BF16
            if not format.exact:
                losses.append(Loss("EMBED_DROPPED", name, format.name, "16 bits"))
        elif format.exact:
            raise BadInput(
                f"{module.unit} is {format.name}, and EXL3 quantizes every matrix to 1 to 8 bits; "
                "search without 16-bit candidates, and with --freeze for the embedding"
            )
        else:
            losses.append(Loss("NAME_ONLY", name, format.name, f"EXL3 of {format.bits} bits"))
    return Translation(formats, tuple(losses))


def widths(policy: Policy, formats: Mapping[str, Format]) -> dict[str, int]:
    """Bits of every key of the overrides; `*` at its end stands for the tensors of a module."""
    found = {}
    for name, module in policy.modules.items():
        if module.role == "embedding":
            continue
        for key in _keys(name):
            found[key] = formats[name].bits
    return found


def _keys(tensor: str) -> list[str]:
    """What ExLlamaV3 calls the tensors of a parameter."""
    stem, _, leaf = tensor.rpartition(".experts.")
    if stem:  # stacked in transformers, one by one there
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        return [f"{stem}.experts.*.{part}.*" for part in leaves]
    return [f"{tensor.removesuffix('.weight')}.*"]


def write(
    policy: Policy, translation: Translation, folder: Path, checkpoint: Checkpoint | None
) -> Mapping[str, int]:
    """The overrides and the commands; weights are never written."""
    found = widths(policy, translation.formats)
    (folder / OVERRIDES).write_text(overrides(found), encoding="utf-8")
    head = next((bits for key, bits in found.items() if key.startswith("lm_head")), _HEAD_BITS)
    (folder / SCRIPT).write_text(commands(sorted(set(found.values())), head), encoding="utf-8")
    return {}


def overrides(found: Mapping[str, int]) -> str:
    """The file for `util/recompile.py --override`."""
    lines = ["sources:\n"]
    lines += [
        f"- {{id: {json.dumps(_source(bits))}, model_dir: {json.dumps(_source(bits))}}}\n"
        for bits in sorted(set(found.values()))
    ]
    lines.append("overrides:\n")
    lines += [
        f"- {{key: {json.dumps(key)}, source: {json.dumps(_source(bits))}}}\n"
        for key, bits in found.items()
    ]
    return "".join(lines)


def _source(bits: int) -> str:
    return f"exl3-{bits}bpw"


def commands(bits: list[int], head: int) -> str:
    """From the model of transformers to the mixed one; folders lie where it is run."""
    lines = [
        "#!/bin/sh\n",
        "# usage: convert.sh MODEL OUT, in the folder of exllamav3, on a machine with a GPU\n",
        "set -e\n",
        'here=$(dirname "$0")\n',
    ]
    lines += [
        f'python convert.py -i "$1" -o {_source(width)} -w work-{width} -b {width} -hb {head}\n'
        for width in bits
    ]
    lines.append(
        f'python util/recompile.py -i {_source(bits[-1])} -o "$2" -or "$here/{OVERRIDES}"\n'
    )
    return "".join(lines)


EXPORTER = Exporter(
    about="overrides for ExLlamaV3's recompile, and the uniform models it needs (1.6)",
    translate=translate,
    write=write,
)
