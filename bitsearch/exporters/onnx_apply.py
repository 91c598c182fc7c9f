"""Put quantized weights into an ONNX graph: apply.py GRAPH.onnx OUT.onnx

Every matrix of `matmul_nbits.json` is found among the constants that the graph multiplies
by, by sixteen of its values; its MatMul becomes MatMulNBits with the codes of
`matmul_nbits.safetensors`. A matrix that is not found, or found twice, is an error, and
nothing is written. Needs onnx, numpy and safetensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RULES, WEIGHTS = "matmul_nbits.json", "matmul_nbits.safetensors"
DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
_PROBES = 16
_TOLERANCE = 2.0**-8  # graphs may hold bfloat16


def probe(weight: Any) -> list[float]:
    """Sixteen values of an (out, in) float matrix, evenly spread, by which it is known."""
    places = np.linspace(0, weight.size - 1, _PROBES).astype(np.int64)
    return [float(value) for value in weight.reshape(-1)[places]]


def quantized_nodes(path: Path) -> dict[str, tuple[int, int, bool]]:
    """Bits, group size and symmetry of each MatMulNBits node of a file, by its name."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == OPERATOR:
            values = {a.name: a.i for a in node.attribute}
            symmetric = len(node.input) < 4 or not node.input[3]
            found[node.name] = (values["bits"], values["block_size"], symmetric)
    return found


def apply(graph: Any, rules: dict[str, Any], weights: dict[str, Any]) -> None:
    """Replace the MatMul of every matrix in an ONNX graph.

    Raises:
        ValueError: a matrix is not in the graph, or more than once.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            uses.setdefault(node.input[1], []).append(node)
    sizes: dict[tuple[int, ...], list[str]] = {}
    for name in uses:
        sizes.setdefault(tuple(constants[name].dims), []).append(name)
    for name, rule in rules.items():
        rows, columns = rule["shape"]
        matching = [
            found
            for found in sizes.get((columns, rows), [])
            if _same(probe(numpy_helper.to_array(constants[found]).T.astype(np.float32)), rule)
        ]
        if len(matching) != 1 or len(uses[matching[0]]) != 1:
            raise ValueError(f"{name} is multiplied by {len(matching)} times, not once")
        (node,) = uses[matching[0]]
        dtype = numpy_helper.to_array(constants[matching[0]]).dtype
        inputs = []
        for key, tensor in _inputs(name, weights, dtype):
            graph.initializer.append(numpy_helper.from_array(tensor, f"{name}/{key}"))
            inputs.append(f"{name}/{key}")
        new = helper.make_node(
            OPERATOR,
            [node.input[0], *inputs],
            list(node.output),
            name=name.removesuffix(".weight"),
            domain=DOMAIN,
            K=columns,
            N=rows,
            bits=rule["bits"],
            block_size=rule["block_size"],
        )
        graph.node.insert(list(graph.node).index(node), new)
        graph.node.remove(node)
        graph.initializer.remove(constants[matching[0]])


def _same(values: Sequence[float], rule: dict[str, Any]) -> bool:
    wanted = np.array(rule["probe"])
    return bool(np.all(np.abs(np.array(values) - wanted) <= _TOLERANCE * np.abs(wanted)))


def _inputs(name: str, weights: dict[str, Any], dtype: Any) -> Iterator[tuple[str, Any]]:
    """Codes, scales in the dtype of the graph, zero points: the order of the operator."""
    yield "codes", weights[f"{name}/codes"]
    yield "scales", weights[f"{name}/scales"].reshape(-1).astype(dtype)
    if f"{name}/zeros" in weights:
        yield "zeros", weights[f"{name}/zeros"].reshape(-1)


def main() -> None:
    """Read the graph named first, write the one named second."""
    import onnx
    from onnx import helper
    from safetensors.numpy import load_file

    source, out = sys.argv[1:]
    here = Path(__file__).parent
    rules = json.loads((here / RULES).read_text(encoding="utf-8"))["matrices"]
    model = onnx.load(source)
    try:
        apply(model.graph, rules, load_file(here / WEIGHTS))
    except ValueError as error:
        sys.exit(f"{source}: {error}")
    if all(known.domain != DOMAIN for known in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(
        model,
        out,
        save_as_external_data=model.ByteSize() > 2**31 - 2**20,
        location=f"{Path(out).name}.data",
    )


if __name__ == "__main__":
    main()
