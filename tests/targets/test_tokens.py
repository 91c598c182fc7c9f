"""A searched policy of SmolLM2-135M says the same in every engine that runs its export.

The policy is found by a real search for vLLM on CPU. What an engine continues is compared
with our fake-quantized model in float32: token by token, and by how far any token it took
lies below the best one. Engines compute in 16 bits, so near ties may fall the other way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitsearch.exporters.pipeline import export_policy
from bitsearch.search import Request, search
from bitsearch.session import open_session

MODEL = "smollm2-135m"
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "In 1905, Albert Einstein published",
    "def fibonacci(n):\n",
    "Water boils at",
    "The mitochondria is",
    "To bake a loaf of bread, first",
    "The history of the Roman Empire begins",
)
COUNT = 24
SEARCH = {
    "target": "vllm-cpu",
    "candidates": "int4-g{32,64,128}-sym,bf16",
    "length": 256,
    "windows": "2,2,4",
}
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


@pytest.fixture(scope="session")
def searched() -> Path:
    """The policy; its run is kept beside the environments, and resumed."""
    home = Path(os.environ.get("BITSEARCH_TARGET_ENVS") or "~/.cache/bitsearch/targets")
    run = home.expanduser() / "searched"
    with open_session(MODEL, run, "cpu", SEARCH) as session:
        request = Request(("7.2bpw",), "fisher_output", "pareto_dp", 0)
        search(session, request, lambda *_: None)
    return run / "policy.json"


@dataclass(frozen=True)
class Measured:
    """The policy, its model, and what that model says."""

    policy: Path
    model: Any
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="session")
def measured(searched: Path, fake: Any) -> Measured:
    model = fake(searched, MODEL)
    prompts = model.prompts(TEXTS)
    return Measured(searched, model, prompts, model.tokens(prompts, COUNT))


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
    written = export_policy(
        measured.policy, target, tmp_path / "out", model=MODEL, allowed=(), dtype=dtype,
        statistics=None, device="cpu", force=False, progress=lambda *_: None,
    )  # fmt: skip
    assert written["losses"] == [] and written["tensor_bytes"] == written["predicted_bytes"]
    prompts = measured.prompts
    found = tools.run(script, tmp_path / "out", dtype, _listed(prompts), COUNT,
                      GPTQMODEL_CPU_WORKERS="2")  # fmt: skip
    pairs = zip(measured.tokens, found, strict=True)
    same = sum(_same(mine, theirs) for mine, theirs in pairs)
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


def _same(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(mine, theirs, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(mine))


def _listed(prompts: Sequence[Sequence[int]]) -> str:
    return str([list(prompt) for prompt in prompts])
