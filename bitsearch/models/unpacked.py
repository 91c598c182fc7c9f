"""Checkpoints that other tools quantized and packed, as the values that they stand for.

Read are the layouts of compressed-tensors 0.20 (packed integers, FP8, MXFP8, MXFP4, NVFP4)
and those of GPTQ, which AutoRound shares. A tensor of either is told from its name and
type; integers have as many bits as their words hold for a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.formats.levels import LevelFormat
from bitsearch.models.reason import reason
from bitsearch.models.source import Source
from bitsearch.models.stored import listed_tensors
from bitsearch.models.weights import all_finite
from bitsearch.quantizers.words import codes_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_WORD = 32
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class UnpackedParameters:
    """Parameters of a quantized checkpoint, each unpacked when it is asked for.

    Attributes:
        files: file by stored tensor.
        shapes: of the parameters, by name.
        offset: of GPTQ's zero points: 1 in the first version of the layout, else 0.
        device: where they are wanted.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    offset: int
    device: torch.device | str

    def get_parameter(self, target: str) -> Tensor:
        """A float32 copy of a parameter.

        Raises:
            AttributeError: there is no such parameter.
            BadInput: the file is damaged, or holds NaN or infinite weights.
        """
        import torch

        module = target.removesuffix(".weight")
        if f"{module}.qweight" in self.files:
            found = self._gptq(module, *self.shapes[target])
        elif f"{module}.weight_scale" in self.files:
            found = self._compressed(module, *self.shapes[target])
        elif target in self.files:
            found = self._read(target)
        else:
            raise AttributeError(f"no parameter '{target}'")
        found = found.to(self.device, torch.float32)
        if not all_finite(found):
            raise BadInput(f"{self._parent}: '{target}' holds NaN or infinite weights")
        return found

    @property
    def _parent(self) -> Path:
        return next(iter(self.files.values())).parent

    def _read(self, key: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[key], framework="pt") as stored:
                return cast("Tensor", stored.get_tensor(key))
        except KeyError as error:
            raise BadInput(f"{self._parent} holds no '{key}'") from error
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{self.files[key]} is damaged: {reason(error)}") from error

    def _gptq(self, module: str, rows: int, columns: int) -> Tensor:
        """(rows, columns) values; words go down the columns of the transposed matrix."""
        import torch

        packed = self._read(f"{module}.qweight").T.contiguous()
        bits = packed.shape[1] * _WORD // columns
        scales = self._read(f"{module}.scales").T
        zeros = codes_in(self._read(f"{module}.qzeros"), bits, rows).T.int() + self.offset
        name = f"{module}.g_idx"
        order = self._read(name).long() if name in self.files else None
        if order is None:
            order = torch.arange(columns) // -(-columns // scales.shape[1])
        return _values(codes_in(packed, bits, columns), scales, zeros, order)

    def _compressed(self, module: str, rows: int, columns: int) -> Tensor:
        """(rows, columns) values."""
        import torch

        scales = self._read(f"{module}.weight_scale")
        eight = f"{module}.weight_packed" not in self.files
        packed = self._read(f"{module}.weight" if eight else f"{module}.weight_packed")
        if packed.dtype != torch.int32:
            return self._floats(module, packed, scales, columns)
        if f"{module}.weight_g_idx" in self.files:
            raise BadInput(f"{self._parent}: '{module}' has its columns in another order")
        bits = packed.shape[1] * _WORD // columns
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int32)
        if (name := f"{module}.weight_zero_point") in self.files:
            zeros = codes_in(self._read(name).T.contiguous(), bits, rows).T.int()
        order = torch.arange(columns) // -(-columns // scales.shape[1])
        return _values(codes_in(packed, bits, columns), scales, zeros, order)

    def _floats(self, module: str, packed: Tensor, scales: Tensor, columns: int) -> Tensor:
        """Values of small floats, from their bytes."""
        import torch

        from bitsearch.quantizers.levelled import unpack

        powers, eight = scales.dtype == torch.uint8, packed.dtype == torch.float8_e4m3fn
        name = ("mxfp8" if powers else "fp8") if eight else "mxfp4" if powers else "nvfp4"
        format = cast(LevelFormat, parse_format(name))
        if not eight and packed.dtype != torch.uint8:
            raise BadInput(
                f"{self._parent}: '{module}' is packed in {packed.dtype}, which is no layout known"
            )
        scales = scales.expand(packed.shape[0], -1) if scales.numel() == 1 else scales
        if scales.shape[1:] != (format.groups(columns),):
            raise BadInput(f"{self._parent}: the scales of '{module}' are none of {name}'s")
        parts = {"codes": packed.view(torch.uint8), "scales": scales}
        if name == "nvfp4":
            parts["scale"] = self._read(f"{module}.weight_global_scale").float().reciprocal()
        return unpack(parts, format, columns).dequantize()


def _values(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> Tensor:
    """scale · (code − zero), the group of each column given."""
    found: Tensor = (codes.int() - zeros[:, order]).float().mul_(scales.float()[:, order])
    return found


def open_unpacked(
    source: Source, model: PreTrainedModel, device: torch.device | str
) -> UnpackedParameters | None:
    """The parameters of a checkpoint that another tool quantized.

    Args:
        source: the files, on this machine.
        model: its skeleton, without weights.
        device: where the parameters are wanted.

    Returns:
        None if the checkpoint is not quantized.

    Raises:
        BadInput: it is in a layout that is not read here, damaged, or of another model.
    """
    if source.gguf is not None or source.packed:
        return None
    try:
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{source.path / 'config.json'} cannot be read: {error}") from error
    said: Any = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(said, dict):
        return None
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = listed_tensors(source)
    files = {key: file for key, (file, _, _) in stored.items()}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        packed = f"{module}.qweight" in files or f"{module}.weight_scale" in files
        _, plain, dtype = stored.get(name, (Path(), [], ""))
        if (not packed or len(shape) != 2) and (plain != list(shape) or dtype not in _FLOATS):
            raise BadInput(f"{source.path} holds no '{name}' of {list(shape)} that is read here")
    return UnpackedParameters(files, shapes, _offset(source, said), device)


def _offset(source: Source, said: Mapping[str, Any]) -> int:
    """What the layout subtracts from zero points."""
    method = said.get("quant_method")
    if method == "gptq" and (version := said.get("checkpoint_format", "gptq")) in (
        "gptq",
        "gptq_v2",
    ):
        return int(version == "gptq")
    packing = str(said.get("packing_format", ""))
    if method == "auto-round" and packing in ("auto_round:auto_gptq", "auto_round"):
        return int(packing == "auto_round:auto_gptq")
    if method == "compressed-tensors":
        return 0
    raise BadInput(
        f"{source.path} is quantized by {method} ({packing or said.get('checkpoint_format')}), "
        "which is not read here; read are compressed-tensors, gptq and auto-round"
    )
