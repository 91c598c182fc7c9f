"""ONNX Runtime runs a graph of torch.onnx with our weights put in, and says the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitsearch.exporters.pipeline import export_policy
from bitsearch.models.builtin import builtin_folder
from bitsearch.models.load import open_layout

COUNT = 24
FORMATS = ("int4-g32", "int8-g64-sym", "int2-g32", "int4-g128-sym", "int8-g16", "int4-g256")


def test_onnx_runtime_continues_as_the_measured_model_does(
    environment: Any, record: Any, fake: Any, make_policy: Callable[[Mapping[str, str]], Path],
    texts: Any, tmp_path: Path,
) -> None:  # fmt: skip
    tools = environment("onnx")
    layout = open_layout("tiny")[0]
    linear = [m.module for u in layout.units for m in u.matrices if u.kind != "embedding"]
    names = [name.removeprefix("model.layers.") for name in linear]
    policy = make_policy({n: FORMATS[i % len(FORMATS)] for i, n in enumerate(names[:-3])})
    told = export_policy(policy, "onnxruntime", tmp_path / "out", model="tiny")
    assert told["losses"] == [] and told["predicted_bytes"] == told["tensor_bytes"]
    assert tools.run("onnx_graph.py", builtin_folder("tiny"), tmp_path / "graph.onnx")
    script = [str(tmp_path / "out" / "apply.py"), str(tmp_path / "graph.onnx")]
    done = tools.call([*script, str(tmp_path / "quantized.onnx")])
    assert done.returncode == 0, done.stderr
    model = fake(policy, "tiny")
    prompts = model.prompts(texts[:3])
    found = tools.run("onnx_tokens.py", tmp_path / "quantized.onnx", json.dumps(prompts), COUNT)
    below = model.shortfall(prompts, found)
    equal = model.equal(prompts, found)
    record(
        "onnxruntime",
        tools.version("onnxruntime"),
        "tiny, 2, 4 and 8 bits mixed, greedy tokens in a graph of torch.onnx",
        f"{equal} of {COUNT * len(prompts)}; at most {below:.3f} logits below the best token",
    )
    assert below == 0 and equal == COUNT * len(prompts)
