"""What compressed-tensors 0.20 stores for each format: layout, scheme and tensors.

| format | layout | tensors of a module |
|---|---|---|
| integers | pack-quantized | 32-bit words of codes, 16-bit scales, zero points, the shape |
| `fp8` | float-quantized | E4M3 values, a float32 scale a row |
| `mxfp8` | mxfp8-quantized | E4M3 values, a power of two (E8M0) for each 32 |
| `mxfp4` | mxfp4-pack-quantized | two E2M1 values a byte, a power of two for each 32 |
| `nvfp4` | nvfp4-pack-quantized | two E2M1 values a byte, an E4M3 scale for each 16, and one \
float32 that divides all scales |

Inputs stay at 16 bits. NVFP4's divisor is the reciprocal of the measured scale of the
matrix, rounded to float32: weights differ by 2⁻²³ of themselves at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bitsearch.errors import BadInput
from bitsearch.formats import Format, parse_format
from bitsearch.formats.integer import INT_BITS, IntFormat
from bitsearch.quantizers.words import words

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.quantizers.codec import Encoded
    from bitsearch.quantizers.quantized import Quantized

_MIXED = "mixed-precision"
_PACKED = "pack-quantized"
# layout, and what of a scheme's weights says which of the float formats it is
_FLOATS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fp8": ("float-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32,
                                  "scale_dtype": "torch.uint8"}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32,
                                       "scale_dtype": "torch.uint8"}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group",
                                       "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
}  # fmt: skip


def layout_of(format: Format) -> str | None:
    """The layout that holds a format; None if none does."""
    if isinstance(format, IntFormat):
        return _PACKED
    return _FLOATS[format.name][0] if format.name in _FLOATS else None


def layout_of_all(layouts: set[str]) -> str:
    """What a checkpoint with modules in these layouts says of itself."""
    return _MIXED if len(layouts) > 1 else next(iter(layouts), _PACKED)


def weight_arguments(format: Format) -> dict[str, Any]:
    """The `weights` of a scheme."""
    if not isinstance(format, IntFormat):
        return {"type": "float", "symmetric": True, "dynamic": False, **_FLOATS[format.name][1]}
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "channel" if format.group_size is None else "group",
        "group_size": format.group_size,
        "dynamic": False,
    }


def packed(name: str, encoded: Encoded) -> dict[str, Tensor]:
    """The stored tensors of a matrix; `name` is the module's.

    Raises:
        BadInput: only the values are known, not the codes.
    """
    if isinstance(encoded.format, IntFormat):
        return _packed_integers(name, cast("Quantized", encoded))
    import torch

    parts = encoded.pack()
    found = {f"{name}.weight_scale": parts["scales"]}
    if encoded.format.bits == 8:
        found[f"{name}.weight"] = parts["codes"].view(torch.float8_e4m3fn)
    else:
        found[f"{name}.weight_packed"] = parts["codes"]
    if "scale" in parts:
        found[f"{name}.weight_global_scale"] = parts["scale"].reciprocal()
    return found


def _packed_integers(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The pack-quantized layout."""
    import torch

    format = quantized.format
    found = {
        f"{name}.weight_packed": words(quantized.codes, format.bits),
        f"{name}.weight_scale": quantized.scales.cpu().contiguous(),
        f"{name}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if not format.symmetric:
        zeros = words(quantized.zeros.T.contiguous(), format.bits)
        found[f"{name}.weight_zero_point"] = zeros.T.contiguous()
    return found


def read_weights(path: Path, weights: Mapping[str, Any]) -> tuple[Format, str]:
    """A format from the `weights` of a scheme, and what the format leaves out.

    Raises:
        BadInput: no format of ours.
    """
    bits: Any = weights.get("num_bits")
    group: Any = weights.get("group_size")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    symmetric = bool(weights.get("symmetric", True))
    if kind == "float" and symmetric:
        said = (bits, strategy, group if group and group > 0 else None)
        for name, (_, fields) in _FLOATS.items():
            if said == (fields["num_bits"], fields["strategy"], fields["group_size"]):
                return parse_format(name), ""
        if said == (8, "tensor", None):
            return parse_format("fp8"), "one scale for a whole tensor"
    grouped = strategy == "group" and isinstance(group, int) and group > 0
    if kind != "int" or bits not in INT_BITS or not (grouped or strategy == "channel"):
        raise BadInput(f"{path}: no format of ours is {bits}-bit {kind} by {strategy}")
    return IntFormat("int", bits, group if grouped else None, symmetric), ""
