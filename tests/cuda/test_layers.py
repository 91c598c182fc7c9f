"""Operators, layers and launches on the processor, where the references run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.kernels.devices import open_device
from bitsearch.kernels.fused import Fused
from bitsearch.kernels.operators import dequantize, matmul
from bitsearch.kernels.partition import Tuning, partition
from bitsearch.kernels.planes import Shape
from bitsearch.kernels.quantized_linear import QuantizedLinear, replace_linears
from bitsearch.kernels.random_planes import error, random_fused, random_input
from bitsearch.quantizers.rtn import quantize

PARTS = [(20, 3, 64, False), (37, 8, None, True)]


class Block(nn.Module):
    """Two products of one input and one of their sum, as a decoder calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(96, 48)
        self.k = nn.Linear(96, 48, bias=False)
        self.o = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.relu(self.q(x)) + self.k(x))


def test_operators_are_registered_and_traced() -> None:
    weight, x = random_fused(PARTS, 130), random_input(3, 130, torch.float32)
    assert error(matmul(x, weight), weight, x) < 1e-6
    assert torch.equal(dequantize(weight, torch.float16), weight.dequantize().half())
    traced = torch.compile(lambda x: matmul(x, weight), backend="eager", fullgraph=True)
    assert torch.equal(traced(x), matmul(x, weight))
    torch.library.opcheck(
        torch.ops.bitsearch.plane_matmul.default,
        (x, weight.data, [3, 64, 0, 20, 130, 8, 0, 1, 37, 130], None, False),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_rounded_inputs_are_off_by_half_a_step_at_most() -> None:
    weight, x = random_fused(PARTS, 130), random_input(3, 130, torch.float32)
    step = x.abs().amax(1, keepdim=True) / 127
    most = 0.5 * step * weight.dequantize().abs().sum(1)
    assert ((matmul(x, weight, integers=True) - matmul(x, weight)).abs() <= 1.001 * most).all()


def test_a_model_runs_on_quantized_layers() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 5, 96)
    formats = {"q.weight": "int4-g32", "k.weight": "int8-g32-sym", "o.weight": "int6-row"}
    weights = {
        name: quantize(model.get_parameter(name).detach(), parse_format(format))
        for name, format in formats.items()
    }
    dense = Block()
    dense.load_state_dict(
        model.state_dict() | {name: each.dequantize() for name, each in weights.items()}
    )
    replace_linears(model, weights, [("q.weight", "k.weight")])
    assert all(isinstance(layer, QuantizedLinear) for layer in (model.q, model.k, model.o))
    assert model.q.product is model.k.product
    for _ in range(2):
        assert torch.allclose(model(x), dense(x), atol=1e-5)
        x = x + 1
    with pytest.raises(BadInput, match=r"'relu\.weight' is not the weight of a linear layer"):
        replace_linears(model, {"relu.weight": weights["q.weight"]}, [])


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("columns", [576, 4096, 14336])
def test_every_block_of_rows_is_dealt_once_and_evenly(columns: int, m: int) -> None:
    shapes = [Shape(4, 128, True, 4096, columns), Shape(8, 64, False, 1000, columns)]
    shapes.append(Shape(2, 0, True, 24, columns))
    plan = partition(shapes, m, 132, 233472, Tuning())
    wanted = sorted(s << 24 | b for s, shape in enumerate(shapes) for b in range(shape.blocks))
    loads = np.zeros(len(plan.plan))
    for split in range(plan.splits):
        own = range(split, len(plan.plan), plan.splits)
        dealt = [int(item) for w in own for item in plan.plan[w, 1 : 1 + plan.plan[w, 0]]]
        assert sorted(dealt) == wanted
    for worker, row in enumerate(plan.plan):
        loads[worker] = sum(shapes[item >> 24].tile_bytes for item in row[1 : 1 + row[0]])
    heaviest = max(shape.tile_bytes for shape in shapes)
    assert loads.max() <= loads.mean() + heaviest
    assert plan.shared_bytes <= 232448


def test_what_cannot_run_is_said_in_one_line() -> None:
    weight = random_fused(PARTS, 130)
    with pytest.raises(BadInput, match="inputs have 96 features, the weight 130"):
        matmul(torch.zeros(1, 96), weight)
    with pytest.raises(BadInput, match="inputs are on meta"):
        matmul(torch.zeros(1, 130, device="meta"), weight)
    with pytest.raises(BadInput, match="do not fit into shared memory"):
        partition([Shape(8, 32, False, 64, 128)], 16, 4, 30_000, Tuning())
    assert isinstance(weight.to("cpu"), Fused)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="needs an NVIDIA GPU"):
            open_device("cuda", 1)
