"""mlx-lm opens what we write; MLX decodes and continues as the measured model does.

MLX computes in the dtype of scales and norms, float16. With these widened to float32 the
same model gives the same tokens; as it is, near ties may fall the other way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.models.builtin import builtin_folder
from bitsearch.policy import load_policy

COUNT = 24


@pytest.fixture(scope="session", params=["tiny", "smollm2-135m"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, searched_for: Any
) -> tuple[str, Path, Path]:
    """A model, a policy searched for MLX, and its export."""
    model = str(request.param)
    # the weights of smollm2-135m were of 4 bits in groups of 32 once, which would cost nothing
    policy = searched_for("mlx", model, "4.5bpw", candidates="int{3,4,5,6,8}-g64-fz,bf16")
    out = tmp_path_factory.mktemp(model) / "out"
    told = export_policy(policy, "mlx", out, model=model)
    assert told["losses"] == [] and told["predicted_bytes"] == told["tensor_bytes"]
    return model, policy, out


def test_mlx_continues_as_the_measured_model_does(
    environment: Any, record: Any, fake: Any, texts: Any, written: tuple[str, Path, Path]
) -> None:
    model, policy, folder = written
    tools, measured = environment("mlx"), fake(policy, model)
    for dtype in ("float32", "float16"):
        # on a CPU, MLX takes 20 seconds a token of smollm2-135m in float16
        slow = dtype == "float16" and model != "tiny"
        prompts, count = measured.prompts(texts[:1] if slow else texts), 6 if slow else COUNT
        found = tools.run("mlx_tokens.py", folder, dtype, json.dumps(prompts), count)
        equal = measured.equal(prompts, found)
        below = measured.shortfall(prompts, found)
        record(
            "mlx",
            tools.version("mlx"),
            f"{model}, searched policy, greedy tokens in {dtype}",
            f"{equal} of {count * len(prompts)} until the first difference; at most {below:.3f} "
            "logits below the best token",
        )
        # of two tokens as good as each other, either may be taken
        assert below <= (1e-3 if dtype == "float32" else 0.1)


def test_mlx_resolves_every_module_as_the_policy_says(
    environment: Any, record: Any, written: tuple[str, Path, Path]
) -> None:
    model, policy, folder = written
    tools = environment("mlx")
    found = tools.run("mlx_resolve.py", folder)
    decided = load_policy(policy)
    for name in decided.modules:
        format = decided.format_of(name)
        expected = None if format.exact else [format.group_size, format.bits, "affine"]
        assert found["modules"][name.removesuffix(".weight")] == expected, name
    assert found["rope"] == json.loads((folder / "config.json").read_text())["rope_theta"]
    record("mlx", tools.version("mlx-lm"), f"{model}, each module is looked up", "as in the policy")


def test_mlx_lm_quantizes_by_the_rules(
    environment: Any, record: Any, written: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """With its own rounding; modules, widths and groups are those of the policy."""
    model, policy, _ = written
    tools, out = environment("mlx"), tmp_path / "rules"
    export_policy(policy, "mlx", out)
    source = tmp_path / "source"
    source.mkdir()
    for file in builtin_folder(model).iterdir():
        (source / file.name).symlink_to(file)
    script = str(out / "convert.py")
    refused = tools.call([script, str(source), str(tmp_path / "refused")])
    assert refused.returncode != 0 and "rope_theta" in refused.stderr
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    done = tools.call([script, str(source), str(tmp_path / "converted")])
    assert done.returncode == 0, done.stderr
    import_policy(tmp_path / "converted", "mlx", model, tmp_path / "again.json", force=False)
    again, decided = load_policy(tmp_path / "again.json"), load_policy(policy)
    assert {n: m.format for n, m in again.modules.items()} == {
        n: m.format for n, m in decided.modules.items()
    }
    record("mlx", tools.version("mlx-lm"), f"{model}, convert by the rules, read back",
           "as in the policy")  # fmt: skip


def test_why_rules_have_a_small_global_group(environment: Any, tmp_path: Path) -> None:
    """A module whose rows the global group does not divide is skipped, whatever its own says."""
    found = environment("mlx").run("mlx_skips.py")
    assert found == {"32": True, "128": False}
