"""Loading: whole, finite, evaluation mode, or one clear line about what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsearch.errors import BadInput, UsageError
from bitsearch.models import fingerprint, load_model, open_layout, resolve

Make = Callable[..., Any]
WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_model(resolve(str(folder)), dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loaded_model_is_the_saved_one(folder: Path) -> None:
    layout, _, source = open_layout(str(folder))
    loaded = load_model(source, dtype="float32", device="cpu", attention="eager")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(loaded.model(tokens).logits, expected)
    assert loaded.layout == layout
    assert loaded.path == folder
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.tokenizer("w5 w9")["input_ids"] == [5, 9]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.float32),
    ],
)
def test_dtype_of_the_parameters(
    folder: Path, dtype: torch.dtype | str, expected: torch.dtype
) -> None:
    model = load_model(resolve(str(folder)), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["float33", "int8", "nn"])
def test_unknown_dtype(folder: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match=dtype):
        load_model(resolve(str(folder)), dtype=dtype)


def test_dtype_of_a_checkpoint_whose_configuration_is_silent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    assert open_layout(str(folder))[0].dtype == "float16"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2", "gemma3_text"], indirect=True)
def test_families_survive_saving(
    family: str, config: Any, instantiate: Make, tokenizer_of: Make, tmp_path: Path
) -> None:
    model = instantiate(config)
    model.save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    loaded = load_model(resolve(str(tmp_path)), dtype="float32", fuse=False)
    assert loaded.layout == open_layout(str(tmp_path), fuse=False)[0]
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, model(tokens).logits)
    assert len(loaded.layout.tied) == config.tie_word_embeddings


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors[name][3, 4].fill_(value))
    assert f"'{name}' holds NaN or infinite" in refusal(folder)


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    message = refusal(folder)
    assert "lacks weights" in message
    assert "k_proj" in message


def test_missing_head_is_not_made_up(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "'lm_head.weight'" in refusal(folder)


def test_unknown_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2, 2)}))
    message = refusal(folder)
    assert "holds unknown weights" in message
    assert "'model.extra.weight'" in message


def test_tensor_of_another_shape(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(32, 41)}))
    assert f"'{name}' has shape [32, 41], but the configuration asks for [32, 40]" in refusal(
        folder
    )


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_weight_file_that_is_cut_off(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    assert f"{folder / WEIGHTS} is damaged" in refusal(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "holds no .safetensors weights" in refusal(folder)


def test_shards(folder: Path) -> None:
    whole = load_model(resolve(str(folder))).model
    (folder / WEIGHTS).unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    sharded = load_model(resolve(str(folder))).model
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    shards[1].unlink()
    assert shards[1].name in refusal(folder)


def test_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in refusal(folder)


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    assert "tokenizer" in refusal(folder)


def test_tokenizer_of_a_larger_model(folder: Path, tokenizer_of: Make) -> None:
    tokenizer_of(97).save_pretrained(folder)
    message = refusal(folder)
    assert "does not belong to this model" in message
    assert "token 96" in message


def test_added_tokens_beyond_the_embedding_are_allowed(folder: Path, tokenizer_of: Make) -> None:
    # Gemma 3 text models ship one token for images that their embedding lacks.
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    assert load_model(resolve(str(folder))).tokenizer.vocab_size == 96


def test_fingerprint_is_of_the_structure(folder: Path) -> None:
    source = resolve(str(folder))
    before = fingerprint(source)
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = "0.0.0"
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].zero_())
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert fingerprint(source) == before
    assert all(value and len(value) == 64 for value in before.values())


def test_fingerprint_sees_names_shapes_dtypes_and_settings(folder: Path) -> None:
    source = resolve(str(folder))
    seen = {fingerprint(source)["tensors_sha256"]}
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    seen.add(fingerprint(source)["tensors_sha256"])
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:95].clone()}))
    seen.add(fingerprint(source)["tensors_sha256"])
    rewrite(folder, lambda t: t.update({"head.weight": t.pop("lm_head.weight")}))
    seen.add(fingerprint(source)["tensors_sha256"])
    assert len(seen) == 4
    before = fingerprint(source)["config_sha256"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert fingerprint(source)["config_sha256"] != before


def test_fingerprint_of_a_configuration_alone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert fingerprint(resolve(str(folder)))["tensors_sha256"] is None
