"""Linear layers of integer matrices in device form; fused sets share one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bitsearch.errors import BadInput
from bitsearch.kernels.fused import Fused, fuse
from bitsearch.kernels.operators import matmul
from bitsearch.kernels.planes import of_quantized
from bitsearch.quantizers.quantized import Quantized


class FusedProduct(nn.Module):
    """x·Wᵀ of matrices below one another, computed when the first of them is asked for.

    A decoder calls q, k and v, or gate and up, one after another with one input. The first
    call makes all outputs; the others, with the same tensor, take theirs.
    """

    data: Tensor

    def __init__(self, weight: Fused, integers: bool) -> None:
        super().__init__()
        self.shapes, self.integers = weight.shapes, integers
        self.register_buffer("data", weight.data)
        if weight.data.is_cuda:
            torch.cuda.synchronize()  # from here on launches may overlap
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        """The output of the matrix `index`."""
        if x is not self._input or index == 0:
            whole = matmul(x, Fused(self.shapes, self.data), integers=self.integers, overlap=True)
            self._input, self._outputs = x, whole.split([s.rows for s in self.shapes], dim=-1)
        found = self._outputs[index]
        if index == len(self.shapes) - 1:
            self._input, self._outputs = None, ()
        return found


class QuantizedLinear(nn.Module):
    """In place of a `nn.Linear`: one matrix of a fused product.

    Args:
        product: shared by all members of the set.
        index: which of them this is.
        bias: (rows,) or None.
    """

    def __init__(self, product: FusedProduct, index: int, bias: Tensor | None) -> None:
        super().__init__()
        shape = product.shapes[index]
        self.in_features, self.out_features = shape.columns, shape.rows
        self.product, self.index = product, index
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        out = self.product.part(x, self.index)
        return out if self.bias is None else out + self.bias


def replace_linears(
    model: nn.Module,
    weights: Mapping[str, Quantized],
    sets: Sequence[Sequence[str]],
    *,
    integers: bool = False,
) -> None:
    """Put quantized linear layers in place of those of a model, on its device.

    Args:
        model: changed in place.
        weights: integer matrices by parameter name, `….weight` of an `nn.Linear`.
        sets: names that share an input, in the order in which they are called; every other
            matrix is a set of its own.
        integers: round inputs to bytes, see `matmul`.

    Raises:
        BadInput: a name is not the weight of an `nn.Linear`, or a set does not fit together.
    """
    grouped = {name for names in sets for name in names}
    for names in [*sets, *([name] for name in weights if name not in grouped)]:
        layers = [_linear(model, name) for name in names]
        device = layers[0].weight.device
        planes = [of_quantized(weights[name]) for name in names]
        product = FusedProduct(fuse(planes).to(device), integers)
        for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
            bias = None if layer.bias is None else layer.bias.data
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(product, index, bias))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name.removesuffix(".weight"))
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise BadInput(f"'{name}' is not the weight of a linear layer; only those have kernels")
    return layer
