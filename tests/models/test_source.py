"""References become files, and everything that cannot be opened says why in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from bitsearch.errors import BadInput
from bitsearch.models import open_layout, resolve
from bitsearch.models.source import weight_files, with_weights


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refusal(reference: str | Path, **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        open_layout(str(reference), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder_is_opened_without_reading_weights(folder: Path) -> None:
    expected, _, source = open_layout(str(folder))
    assert source.path == folder
    assert source.gguf is None
    (folder / "model.safetensors").unlink()
    assert open_layout(str(folder))[0] == expected
    assert expected.reference == str(folder)
    assert expected.dtype == "float32"


def test_misspelt_builtin_name_suggests_the_right_one() -> None:
    message = refusal("smollm2-135")
    assert "did you mean 'smollm2-135m'" in message
    assert "gemma3-270m" in message


@pytest.mark.parametrize("reference", ["./nowhere", "/no/such/folder", "nowhere.gguf", "a/b.gguf"])
def test_missing_path_lists_the_builtin_models(reference: str) -> None:
    message = refusal(reference)
    assert reference in message
    assert "tiny" in message


def test_folder_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert str(tmp_path / "model.gguf") in refusal(tmp_path)


def test_other_file_is_refused(folder: Path) -> None:
    assert "not a model folder" in refusal(folder / "model.safetensors")


def test_file_that_only_has_the_name_of_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and so on")
    assert "model.gguf is not a GGUF file" in refusal(tmp_path / "model.gguf")


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../other.safetensors", "/other.safetensors", 3]
)
def test_an_index_lists_safetensors_beside_it_alone(folder: Path, shard: Any) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=rf"lists '{re.escape(str(shard))}', which is no"):
        weight_files(resolve(str(folder)))


@pytest.mark.parametrize("index", ['{"weight_map": ["a"]}', "{}"])
def test_an_index_without_a_map_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match="has no weight_map"):
        weight_files(resolve(str(folder)))


def test_a_model_with_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "merge it into the model first" in refusal(folder)


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"")
    assert open_layout(str(folder))[0].units


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "quux"}, "'quux' is unknown"),
        ({"model_type": "quux", "auto_map": {"AutoConfig": "x.Y"}}, "never run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
        ({"model_type": "t5", "architectures": None}, "has an encoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "vit", "architectures": None}, "no causal language model"),
        ({"num_hidden_layers": "two"}, "expected int, got str"),
        ({"hidden_size": 33, "head_dim": None}, "config"),
    ],
)
def test_unusable_configuration(folder: Path, changes: dict[str, Any], expected: str) -> None:
    edit_config(folder, **changes)
    assert expected in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_broken_configuration_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in refusal(folder)


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    edit_config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    open_layout(str(folder))
    assert not (folder / "ran").exists()


def test_revision_of_a_folder_is_refused(folder: Path) -> None:
    assert "revision 'main'" in refusal(folder, revision="main")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `org/name`, with the network switched off."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize(
    ("reference", "revision"),
    [
        ("org/name", None),
        ("org/name", "main"),
        ("org/name@main", None),
        (f"org/name@{COMMIT}", None),
    ],
)
def test_hub_model_is_pinned_to_its_commit(
    hub_cache: Path, reference: str, revision: str | None
) -> None:
    layout, _, source = open_layout(reference, revision=revision)
    assert source.path.parent.parent.parent == hub_cache
    assert source.revision == layout.revision == COMMIT
    assert layout.reference == reference
    assert with_weights(source).path == source.path


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("reference", ["org/other", "org/name@v2"])
def test_hub_model_that_is_not_cached_offline(reference: str) -> None:
    message = refusal(reference)
    assert "HF_HUB_OFFLINE" in message


def test_folder_wins_over_a_hub_id(
    folder: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / COMMIT
    (tmp_path / "org").mkdir()
    snapshot.rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").revision is None
