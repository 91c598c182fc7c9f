"""Checkpoints that other tools packed: our own exports come back as the measured values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from bitsearch.errors import BadInput
from bitsearch.exporters.base import Reading
from bitsearch.exporters.pipeline import export_policy, policy_of
from bitsearch.formats import parse_format
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.layout import skeleton
from bitsearch.models.load import load_model, open_layout
from bitsearch.models.source import resolve
from bitsearch.models.unpacked import UnpackedParameters, open_unpacked
from bitsearch.policy import load_policy, save_policy
from bitsearch.restore import candidate_weights

FORMATS = {
    "gptq": ("int4-g64-sym", "int3-g32-sym", "int8-row-sym", "int2-g128-sym"),
    "gptq, zero points": ("int4-g64", "int3-g32", "int8-row", "int2-g128"),
    "compressed": ("int4-g64", "int3-g32-sym", "int5-row", "int7-g128", "fp8", "mxfp8", "mxfp4"),
}
CASES = [
    ("gptqmodel", "gptq"), ("gptqmodel", "gptq, zero points"), ("autoround", "gptq"),
    ("autoround", "gptq, zero points"), ("compressed-tensors", "compressed"),
]  # fmt: skip
Export = Callable[[str, Mapping[str, str]], tuple[Path, Path]]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """(target, formats by module of `tiny`) -> policy, checkpoint."""

    def write(target: str, formats: Mapping[str, str]) -> tuple[Path, Path]:
        layout, _, source = open_layout("tiny")
        hashes = {key: value for key, value in fingerprint(source).items() if value}
        named = {f"model.layers.{name}.weight": parse_format(f) for name, f in formats.items()}
        path, out = tmp_path / "policy.json", tmp_path / "out"
        path.write_text(save_policy(policy_of(layout, hashes, Reading(named), {})))
        export_policy(path, target, out, model="tiny")
        return path, out

    return write


def opened(folder: Path) -> UnpackedParameters | None:
    return open_unpacked(resolve(str(folder)), skeleton(open_layout("tiny")[1]), "cpu")


@pytest.mark.parametrize(("target", "formats"), CASES)
def test_every_matrix_is_the_measured_one(export: Export, target: str, formats: str) -> None:
    wanted = {f"{index % 6}.mlp.down_proj": f for index, f in enumerate(FORMATS[formats][:6])}
    wanted |= {f"{index}.self_attn.o_proj": f for index, f in enumerate(FORMATS[formats][-2:])}
    path, out = export(target, wanted)
    found = opened(out)
    assert found is not None
    loaded = load_model(open_layout("tiny")[2], dtype="float32")
    policy = load_policy(path)
    weights = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
    for matrix in (m for unit in loaded.layout.units for m in unit.matrices):
        expected = weights.candidate(matrix, policy.format_of(matrix.name))
        assert torch.equal(found.get_parameter(matrix.name), expected), matrix.name
    with pytest.raises(AttributeError):
        found.get_parameter("model.layers.6.mlp.down_proj.weight")


def test_nvfp4_with_the_scale_that_the_library_computes(export: Export) -> None:
    """Packed by compressed-tensors itself, with a tensor scale of its own."""
    name = "model.layers.0.mlp.down_proj"
    _, out = export("compressed-tensors", {"0.mlp.down_proj": "nvfp4"})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    weight = load_model(open_layout("tiny")[2], dtype="float32").model.get_parameter(
        f"{name}.weight"
    )
    whole = 448 * 6 / weight.detach().abs().max().reshape(1)
    peaks = weight.detach().unflatten(1, (-1, 16)).abs().amax(2)
    scales = (peaks / 6 * whole).to(torch.float8_e4m3fn).float()
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    state = {"weight": weight.detach(), "weight_scale": scales, "weight_global_scale": whole}
    packed = compressor.compress(state, scheme)
    file = out / "model.safetensors"
    stored = load_file(file) | {f"{name}.{key}": tensor for key, tensor in packed.items()}
    save_file(stored, file, metadata={"format": "pt"})
    expected = compressor.decompress(packed, scheme)["weight"].float()
    found = opened(out)
    assert found is not None
    torch.testing.assert_close(found.get_parameter(f"{name}.weight"), expected, rtol=2**-8, atol=0)


def test_what_is_not_quantized_is_left_to_others(tmp_path: Path) -> None:
    assert opened(resolve("tiny").path) is None


def test_what_is_not_read_is_refused(export: Export, tmp_path: Path) -> None:
    _, out = export("gptqmodel", {"0.mlp.down_proj": "int4-g64-sym"})

    def refusal(said: Mapping[str, object], drop: str = "") -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out, folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= said
        (folder / "config.json").write_text(json.dumps(config))
        file = folder / "model.safetensors"
        kept = {key: tensor for key, tensor in load_file(file).items() if key != drop}
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(BadInput) as caught:
            found = opened(folder)
            assert found is not None
            found.get_parameter("model.layers.0.mlp.down_proj.weight")
        return str(caught.value)

    assert re.search("quantized by awq .* read are", refusal({"quant_method": "awq"}))
    assert "marlin" in refusal({"checkpoint_format": "marlin"})
    gone = refusal({}, drop="model.layers.0.mlp.down_proj.scales")
    assert "holds no 'model.layers.0.mlp.down_proj.scales'" in gone
    assert "holds no 'model.norm.weight'" in refusal({}, drop="model.norm.weight")


def test_the_group_of_a_column_is_the_one_that_the_file_names(export: Export) -> None:
    """Two groups trade places, and the index of groups says so: the values are as before."""
    name = "model.layers.0.mlp.down_proj"
    _, out = export("gptqmodel", {"0.mlp.down_proj": "int4-g64"})
    before = opened(out)
    assert before is not None
    expected = before.get_parameter(f"{name}.weight")
    file = out / "model.safetensors"
    stored = load_file(file)
    for key in ("scales", "qzeros"):
        stored[f"{name}.{key}"] = stored[f"{name}.{key}"][[1, 0, *range(2, 8)]].contiguous()
    index = stored[f"{name}.g_idx"]
    stored[f"{name}.g_idx"] = torch.where(index < 2, 1 - index, index)
    save_file(stored, file, metadata={"format": "pt"})
    after = opened(out)
    assert after is not None
    assert torch.equal(after.get_parameter(f"{name}.weight"), expected)


def test_compressed_columns_in_another_order_are_refused(export: Export) -> None:
    name = "model.layers.0.mlp.down_proj"
    _, out = export("compressed-tensors", {"0.mlp.down_proj": "int4-g64-sym"})
    file = out / "model.safetensors"
    save_file(
        load_file(file) | {f"{name}.weight_g_idx": torch.arange(512, dtype=torch.int32) // 64},
        file,
        metadata={"format": "pt"},
    )
    found = opened(out)
    assert found is not None
    with pytest.raises(BadInput, match="has its columns in another order"):
        found.get_parameter(f"{name}.weight")
