"""The policy file: read back as written, validated, and robust against damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitsearch
from bitsearch.errors import BadInput
from bitsearch.policy import Policy, json_schema, load_policy, save_policy
from bitsearch.space import Space

MEASUREMENT = {
    "corpus": {"texts": ["t"], "windows": 2, "length": 8, "sha256": "0" * 64},
    "kl": 0.0123456789012345678,
    "kl_ci": [0.01, 0.02],
    "perplexity": 17.25,
    "reference_perplexity": 17.0,
    "top1": 0.875,
}


@pytest.fixture
def content(space: Space) -> dict[str, Any]:
    """A complete policy of the made-up decoder, as JSON values."""
    choice = np.arange(len(space.units)) % len(space.candidates)
    assignment = space.assignment(choice)
    total = space.total_bytes(choice)
    return {
        "schema": "bitsearch.policy/1",
        "model": {
            "reference": "süß/模型",
            "revision": None,
            "architecture": "MadeUpForCausalLM",
            "model_type": "made_up",
            "dtype": "bfloat16",
            "parameters": space.layout.parameters,
            "fingerprint": {"config_sha256": "ab"},
            "tied": [["embed.weight", "head.weight"]],
            "fused": {"blocks.0.qkv": ["blocks.0.q.weight"]},
            "experts": {"blocks.0.experts.up": 3},
        },
        "formats": {
            format.name: {
                "kind": format.kind,
                "bits": format.bits,
                "group_size": format.group_size,
                "symmetric": format.symmetric,
            }
            for _, format in assignment
        },
        "modules": {
            matrix.name: {
                "format": format.name,
                "unit": unit.name,
                "role": matrix.role,
                "block": unit.block,
                "shape": [matrix.out_features, matrix.in_features],
                "count": matrix.count,
                "bytes": matrix.count * format.bytes(matrix.out_features, matrix.in_features),
            }
            for unit, format in assignment
            for matrix in unit.matrices
        },
        "excluded": {"router": "decides which expert runs"},
        "kv_cache": None,
        "target": None,
        "latency": None,
        "quantizer": {
            "method": "rtn",
            "statistics": {"file": "statistics.safetensors", "sha256": "a" * 64},
            "preparation": {"method": "awq", "file": "preparation.safetensors", "sha256": "b" * 64},
            "external": {"int4-g16": {"path": "theirs", "sha256": {"a.safetensors": "c" * 64}}},
        },
        "calibration": None,
        "budgets": ["4.5bpw"],
        "achieved": {
            "bytes": total,
            "kept_bytes": space.layout.kept_bytes,
            "bpw": 8 * total / space.layout.parameters,
            "linear_bpw": 4.4,
            "nominal_bpw": 4.1,
        },
        "damage": {
            "estimator": "kl",
            "predicted": 0.25,
            "selection": dict(MEASUREMENT),
            "evaluation": None,
        },
        "provenance": {"tool": "bitsearch", "solver": "pareto_dp", "gap": 0.0},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes JSON values to a file."""

    def put(content: Any) -> Path:
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return put


@pytest.fixture
def good(content: dict[str, Any], write: Callable[[Any], Path]) -> Path:
    """A valid file."""
    path = write(content)
    path.write_text(save_policy(load_policy(path)), encoding="utf-8")
    return path


def test_what_is_saved_is_loaded(content: dict[str, Any], write: Callable[[Any], Path]) -> None:
    policy = load_policy(write(content))
    text = save_policy(policy)
    assert json.loads(text) == content
    path = write(content)
    path.write_text(text, encoding="utf-8")
    assert load_policy(path) == policy and save_policy(load_policy(path)) == text


def test_a_changed_module_changes_one_line(good: Path, content: dict[str, Any]) -> None:
    """Diffs of policies are readable."""
    before = good.read_text(encoding="utf-8")
    policy = load_policy(good)
    name = "blocks.0.v.weight"
    modules = dict(policy.modules)
    modules[name] = modules[name].model_copy(update={"format": "bf16", "bytes": 2 * 20 * 48})
    after = save_policy(policy.model_copy(update={"modules": modules}))
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert len(changed) == 2 and all(name in line for line in changed)
    lines = before.splitlines()
    assert sum(any(f'"{tensor}": {{"format"' in line for tensor in modules) for line in lines) == (
        len(modules)
    )


def test_every_tensor_has_its_format(good: Path, content: dict[str, Any]) -> None:
    policy = load_policy(good)
    for tensor, module in content["modules"].items():
        assert policy.format_of(tensor).name == module["format"]


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    path = Path(bitsearch.__file__).parent / "schema" / "policy-1.json"
    command = (
        'python -c "import json; from bitsearch.policy import json_schema; '
        f'print(json.dumps(json_schema(), indent=1))" > {path}'
    )
    assert json.loads(path.read_text()) == json_schema(), f"run: {command}"


def test_the_schema_of_the_file_is_version_1(good: Path) -> None:
    schema = json_schema()
    assert schema["properties"]["schema"]["const"] == json.loads(good.read_text())["schema"]
    # nothing is optional that a reader needs
    assert {"schema", "model", "formats", "modules", "achieved"} <= {
        *schema["required"],
        *(n for n, p in schema["properties"].items() if "const" in p),
    }


def _set(content: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split("/")
    for key in way:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("schema", "bitsearch.policy/2", r"schema 'bitsearch.policy/2'.*version of bitsearch"),
        ("schema", None, "schema None"),
        ("surprise", 1, "surprise: Extra inputs"),
        ("model/parameters", -1, "model.parameters"),
        ("model/parameters", 10**400, "model.parameters"),
        ("modules/embed.weight/bytes", 7, "embed.weight is .* bytes in int2-g32, not 7"),
        ("modules/embed.weight/count", 2, "embed.weight is"),
        ("modules/embed.weight/shape", [-200, -48], "modules.embed.weight.shape.0"),
        ("modules/embed.weight/shape", [10**4000, 10**4000], "modules.embed.weight.shape.0"),
        ("modules/embed.weight/shape", [200], "modules.embed.weight.shape"),
        ("modules/embed.weight/format", "int4-g999", "'int4-g999', which is not declared"),
        ("formats/int2-g32/bits", 3, "format 'int2-g32' is declared as another"),
        ("formats/int9-g32", {"kind": "int", "bits": 9, "group_size": 32, "symmetric": True},
         "unknown format 'int9-g32'"),
        ("achieved/bytes", 1, "sum to .* not to achieved.bytes = 1"),
        ("achieved/bpw", float("nan"), "NaN is not a number"),
        ("provenance/gap", float("inf"), "Infinity is not a number"),
        ("damage/selection/kl", "much", "damage.selection.kl"),
        ("quantizer", {}, "quantizer.method"),
        ("quantizer/statistics/file", "../../secret", "quantizer.statistics.file"),
        ("quantizer/statistics/file", "a\\b", "quantizer.statistics.file"),
        ("quantizer/statistics/sha256", "short", "quantizer.statistics.sha256"),
        ("budgets", "4.5bpw", "budgets"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    content: dict[str, Any],
    write: Callable[[Any], Path],
    path: str,
    value: Any,
    message: str,
) -> None:
    _set(content, path, value)
    file = write(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_policy(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 600


def test_a_missing_module_is_missed(content: dict[str, Any], write: Callable[[Any], Path]) -> None:
    del content["modules"]["embed.weight"]
    with pytest.raises(BadInput, match="sum to"):
        load_policy(write(content))


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON"),
        (b"[]", "schema None"),
        (b'"bitsearch.policy/1"', "schema None"),
        (b'{"schema": ["bitsearch.policy/1"]}', "has schema"),
        (b'{"schema": "bitsearch.policy/1"}', "model: Field required"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(raw)
    with pytest.raises(BadInput, match=message):
        load_policy(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            load_policy(path)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_a_clear_error_or_a_valid_policy(
    good: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "delete", "repeat"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at + 1 :]
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 40))]
            raw = raw or bytearray(b" ")
        else:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
    path = tmp_path / "damaged.json"
    path.write_bytes(raw)
    try:
        found = load_policy(path)
    except BadInput as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 600
    else:
        assert isinstance(found, Policy)
        assert found.achieved.bytes == found.achieved.kept_bytes + sum(
            module.bytes for module in found.modules.values()
        )
