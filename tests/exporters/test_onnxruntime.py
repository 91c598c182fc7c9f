"""What MatMulNBits multiplies by, decoded as its operator says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from safetensors.torch import load_file

from bitsearch.errors import BadInput, BitsearchError
from bitsearch.exporters import onnxruntime
from bitsearch.exporters.onnx_apply import probe
from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.load import load_model, open_layout
from bitsearch.policy import Policy, load_policy
from bitsearch.restore import candidate_weights

Make = Callable[[Mapping[str, str]], Path]
TINY = open_layout("tiny")[0]
LINEAR = [m.module for unit in TINY.units for m in unit.matrices if unit.kind != "embedding"]
TAKEN = [f"int{b}-g{g}{s}" for b in (2, 4, 8) for g in (16, 32, 64, 128, 256) for s in ("", "-sym")]


def export(policy: Path, out: Path, model: str | None = None, *allowed: str) -> dict[str, Any]:
    return export_policy(policy, "onnxruntime", out, model=model, allowed=allowed)


def test_the_node_multiplies_by_the_measured_weights(make_policy: Make, tmp_path: Path) -> None:
    path = make_policy(dict(zip(LINEAR, TAKEN, strict=False)))
    told = export(path, tmp_path / "out", "tiny")
    assert told["losses"] == [] and told["predicted_bytes"] == told["tensor_bytes"]
    stored = load_file(tmp_path / "out" / "matmul_nbits.safetensors")
    rules = json.loads((tmp_path / "out" / "matmul_nbits.json").read_text())["matrices"]
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    policy = load_policy(path)
    weights = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
    matrices = {m.name: m for unit in loaded.layout.units for m in unit.matrices}
    assert len(rules) == len(TAKEN)
    for name, rule in rules.items():
        bits, group = rule["bits"], rule["block_size"]
        rows, columns = rule["shape"]
        codes = stored[f"{name}/codes"].numpy()
        assert codes.shape == (rows, columns // group, group * bits // 8)
        scales = stored[f"{name}/scales"].float()
        zeros = torch.full(scales.shape, 2.0 ** (bits - 1))
        if not rule["symmetric"]:
            zeros = from_bits(stored[f"{name}/zeros"].numpy(), bits)[:, : scales.shape[1]]
        values = from_bits(codes.reshape(rows, -1), bits).reshape(rows, -1, group)
        found = (scales[..., None] * (values - zeros[..., None])).reshape(rows, columns)
        expected = weights.candidate(matrices[name], policy.format_of(name))
        assert torch.equal(found, expected), name
        assert rule["probe"] == probe(loaded.model.get_parameter(name).numpy())


def graph_of(weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """x -> x @ W^T for every matrix, whose constants have names of no meaning."""
    helper = onnx.helper
    nodes, constants, outputs = [], [], []
    for index, weight in enumerate(weights.values()):
        constants.append(onnx.numpy_helper.from_array(weight.T.copy(), f"val_{index}"))
        nodes.append(helper.make_node("MatMul", ["x", f"val_{index}"], [f"y{index}"]))
        shape = [None, weight.shape[0]]
        outputs.append(helper.make_tensor_value_info(f"y{index}", onnx.TensorProto.FLOAT, shape))
    columns = next(iter(weights.values())).shape[1]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, columns])
    graph = helper.make_graph(nodes, "made", [x], outputs, constants)
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, ir_version=9, opset_imports=[opset])


def run_script(folder: Path, model: onnx.ModelProto) -> subprocess.CompletedProcess[str]:
    """The script beside the weights, as a user runs it."""
    onnx.save(model, folder / "in.onnx")
    command = [sys.executable, folder / "apply.py", folder / "in.onnx", folder / "out.onnx"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_onnx_runtime_multiplies_by_the_measured_weights(make_policy: Make, tmp_path: Path) -> None:
    """Its own operator, in a graph that another exporter might have written."""
    square = [name for name in LINEAR if name.endswith(("q_proj", "o_proj", "gate_proj"))]
    formats = dict(zip(square, ["int2-g16", "int4-g32", "int8-g64", "int4-g128-sym", "int2-g256"],
                       strict=False))  # fmt: skip
    path = make_policy(formats)
    export(path, tmp_path / "out", "tiny")
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    policy = load_policy(path)
    candidates = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
    matrices = {m.module: m for unit in loaded.layout.units for m in unit.matrices}
    weights = {n: loaded.model.get_parameter(f"{n}.weight").numpy() for n in square}
    done = run_script(tmp_path / "out", graph_of(weights))
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / "out.onnx"
    operators = [node.op_type for node in onnx.load(file).graph.node]
    assert operators.count("MatMulNBits") == len(formats)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = InferenceSession(file).run(None, {"x": x.numpy()})
    for name, y in zip(square, found, strict=True):
        matrix = matrices[name]
        expected = x @ candidates.candidate(matrix, policy.format_of(matrix.name)).T
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)
    imported = onnxruntime.read(file, TINY).formats
    assert {n: f.name for n, f in imported.items()} == {
        n: module.format for n, module in policy.modules.items()
    }


def test_a_graph_without_a_matrix_or_with_two_is_refused(make_policy: Make, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.q_proj"
    export(make_policy({name: "int4-g32"}), tmp_path / "out", "tiny")
    weight = load_model(open_layout("tiny")[2], dtype="float32").model.get_parameter(
        f"{name}.weight"
    )
    for other in ({"a": weight.numpy() * 1.02}, {"a": weight.numpy(), "b": weight.numpy()}):
        done = run_script(tmp_path / "out", graph_of(other))
        assert done.returncode == 1 and f"{name}.weight is multiplied by" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out" / "out.onnx").exists()


def from_bits(packed: Any, bits: int) -> torch.Tensor:
    """(rows, bytes) -> (rows, n) codes, low bit first."""
    flat = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
    return torch.from_numpy((flat * (1 << np.arange(bits))).sum(-1)).float()


@given(st.lists(st.sampled_from([*TAKEN, "bf16"]), min_size=len(LINEAR), max_size=len(LINEAR)))
def test_an_export_is_imported_as_it_was(
    policy_for: Callable[..., Policy], hashes: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory, names: list[str],
) -> None:  # fmt: skip
    policy = policy_for(TINY, hashes, dict(zip(LINEAR, names, strict=True)))
    translation = onnxruntime.translate(policy)
    assert translation.losses == ()
    path = tmp_path_factory.getbasetemp() / "nodes.json"
    path.write_text(json.dumps({"matrices": onnxruntime.rules(policy, translation.formats)}))
    found = onnxruntime.read(path, TINY).formats
    assert {n: f.name for n, f in found.items()} == {n: m.format for n, m in policy.modules.items()}


def test_nodes_are_known_by_the_names_of_other_exporters(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    rule = {"bits": 4, "block_size": 32, "symmetric": True}
    path.write_text(json.dumps({"matrices": {"/model/layers.1/attn/q_proj/MatMul_Q4": rule}}))
    found = onnxruntime.read(path, TINY).formats
    assert found["model.layers.1.self_attn.q_proj.weight"].name == "int4-g32-sym"
    assert sum(not format.exact for format in found.values()) == 1
    path.write_text(json.dumps({"matrices": {"/model/layers.9/attn/q_proj/MatMul_Q4": rule}}))
    with pytest.raises(BadInput, match="of no matrix of tiny"):
        onnxruntime.read(path, TINY)


@pytest.mark.parametrize(
    ("format", "message", "code"),
    [
        ("int3-g64", "int3-g64 becomes int4-g64", "WIDTH_PROMOTED"),
        ("int5-g64-sym", "int5-g64-sym becomes int8-g64-sym", "WIDTH_PROMOTED"),
        ("int4-row", "int4-row becomes int4-g256", "GROUP_COERCED"),
        ("int4-g64-fz", "only integers are multiplied", None),
        ("mxfp4", "only integers are multiplied", None),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(
    make_policy: Make, tmp_path: Path, format: str, message: str, code: str | None
) -> None:
    policy = make_policy({"0.mlp.down_proj": format})
    with pytest.raises(BitsearchError, match=re.escape(message)) as caught:
        export(policy, tmp_path / "out")
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    if code is not None:
        told = export(policy, tmp_path / "out", None, code)
        assert {loss["code"] for loss in told["losses"]} == {code}


def test_a_quantized_embedding_is_dropped_aloud(make_policy: Make, tmp_path: Path) -> None:
    with pytest.raises(BitsearchError, match="EMBED_DROPPED"):
        export(make_policy({"model.embed_tokens": "int8-g64"}), tmp_path / "out")
