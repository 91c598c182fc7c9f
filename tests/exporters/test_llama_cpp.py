"""GGUF files read back by the `gguf` library and by transformers, and types resolved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from bitsearch.errors import BadInput, BitsearchError
from bitsearch.exporters import llama_cpp
from bitsearch.exporters.base import Checkpoint
from bitsearch.exporters.gguf_file import blocks_of, ggml_type
from bitsearch.exporters.gguf_header import add_model
from bitsearch.exporters.gguf_tokenizer import pre_tokenizer
from bitsearch.exporters.pipeline import export_policy, import_policy
from bitsearch.formats import parse_format
from bitsearch.formats.gguf import BLOCKS
from bitsearch.models.layout import find_layout, skeleton
from bitsearch.models.load import load_model, open_layout
from bitsearch.models.source import resolve
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.policy import Policy, load_policy, save_policy
from bitsearch.quantizers.rtn import quantize
from bitsearch.score import candidate_weights
from bitsearch.units import ModelLayout

Make = Callable[[Mapping[str, str]], Path]
For = Callable[..., Policy]
TINY = open_layout("tiny")[0]
MODULES = [matrix.module for unit in TINY.units for matrix in unit.matrices]
MIXED = {"model.embed_tokens": "gguf-q8_0"} | dict(
    zip(MODULES[1:], [*BLOCKS, "fp16", "int4-g32-sym", "mxfp4"], strict=False)
)
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def export(policy: Path, out: Path, model: str | None = None, *allowed: str) -> dict[str, Any]:
    return export_policy(policy, "llama.cpp", out, model=model, allowed=allowed)


def of_family(kind: str, **changes: Any) -> tuple[ModelLayout, PreTrainedConfig]:
    config = AutoConfig.for_model(kind, **LLAMA | changes)
    return find_layout(skeleton(config), reference="made"), config


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, policy_for: For, hashes: dict[str, str]
) -> tuple[Path, CandidateWeights]:
    """An export of `tiny` in every type, and the weights that were measured."""
    folder = tmp_path_factory.mktemp("gguf")
    policy = policy_for(TINY, hashes, MIXED)
    (folder / "policy.json").write_text(save_policy(policy))
    source = open_layout("tiny")[2]
    loaded = load_model(source, dtype="float32")
    weights = candidate_weights(
        loaded.model, policy, folder / "policy.json", None, cache_bytes=1 << 30
    )
    checkpoint = Checkpoint(loaded, weights, source.path, "bfloat16", lambda *_: None)
    translation = llama_cpp.translate(policy)
    assert translation.losses == ()
    stored = llama_cpp.write(policy, translation, folder, checkpoint)
    assert stored == {"model.gguf": translation.bytes}
    return folder, weights


@pytest.fixture(scope="module")
def written(exported: tuple[Path, CandidateWeights]) -> Path:
    return exported[0]


def test_transformers_reads_exactly_the_measured_weights(
    exported: tuple[Path, CandidateWeights],
) -> None:
    """It knows llama.cpp's order of rows, its names and its blocks by itself."""
    folder, weights = exported
    policy = load_policy(folder / "policy.json")
    original = load_model(open_layout("tiny")[2], dtype="float32")
    read = load_model(resolve(str(folder / "model.gguf")), dtype="float32")
    assert {f.name for f in map(policy.format_of, policy.modules)} > set(BLOCKS)
    for unit in original.layout.units:
        for matrix in unit.matrices:
            expected = weights.candidate(matrix, policy.format_of(matrix.name))
            assert torch.equal(read.model.get_parameter(matrix.name), expected), matrix.name
    for name in original.layout.kept:
        assert torch.equal(read.model.get_parameter(name), original.model.get_parameter(name))
    text = "In 2023 it was 3.5% — I've   spaces\n\tand naïve 🚀"
    assert read.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]


def test_the_file_is_its_tensors_and_a_header(written: Path) -> None:
    reader = gguf.GGUFReader(written / "model.gguf")
    padding = sum(-tensor.n_bytes % reader.alignment for tensor in reader.tensors)
    tensors = sum(tensor.n_bytes for tensor in reader.tensors)
    policy = load_policy(written / "policy.json")
    assert llama_cpp.translate(policy).bytes == tensors
    size = (written / "model.gguf").stat().st_size
    assert size - reader.data_offset - padding == tensors
    by_target = sum(module.bytes for module in policy.modules.values())
    assert by_target + 4 * sum(TINY.kept.values()) == tensors


@pytest.mark.parametrize("name", ["int4-g32-sym", "int5-g32-sym", "int8-g32-sym",
                                  "int4-g32-fz", "int5-g32-fz", "mxfp4"])  # fmt: skip
def test_blocks_of_our_own_formats_hold_the_same_values(name: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * 3
    weight[0, :32] = 0
    format = parse_format(name)
    encoded = quantize(weight, format)
    blocks = blocks_of(encoded)
    assert blocks.nbytes == format.bytes(6, 96)
    values = gguf.quants.dequantize(blocks, ggml_type(format))
    assert np.array_equal(values, encoded.dequantize().numpy())


EXPRESSIBLE = [*BLOCKS, "bf16", "fp16"]


@given(st.lists(st.sampled_from(EXPRESSIBLE), min_size=len(MODULES), max_size=len(MODULES)))
def test_an_export_is_imported_as_it_was(
    policy_for: For, hashes: dict[str, str], names: list[str]
) -> None:
    policy = policy_for(TINY, hashes, dict(zip(MODULES, names, strict=True)))
    translation = llama_cpp.translate(policy)
    assert translation.losses == ()
    text = llama_cpp.tensor_types(policy, translation.formats)
    types = llama_cpp.listed_types(text, "types", tensor_names(text))
    found = llama_cpp.formats_of(types, TINY, "types").formats
    assert {n: f.name for n, f in found.items()} == {n: m.format for n, m in policy.modules.items()}


def tensor_names(text: str) -> list[str]:
    return [
        line.partition("=")[0].removeprefix("^").removesuffix("$").replace("\\", "")
        for line in text.splitlines()
    ]


def test_a_gguf_file_is_imported_as_it_was_written(written: Path, tmp_path: Path) -> None:
    policy = load_policy(written / "policy.json")
    for source in (written, written / "model.gguf", written / "tensor_types.txt"):
        import_policy(source, "llama.cpp", "tiny", tmp_path / "again.json", force=True)
        again = load_policy(tmp_path / "again.json")
        same_blocks = {"int4-g32-sym": "gguf-q4_0", "mxfp4": "gguf-mxfp4"}
        for name, module in policy.modules.items():
            expected = same_blocks.get(module.format, module.format)
            assert again.modules[name].format == expected, name
        assert again.achieved.bytes == policy.achieved.bytes


def test_each_line_matches_its_own_tensor_as_llama_quantize_searches(policy_for: For) -> None:
    """`output` alone would also match attn_output; `blk.1` would match blk.10 to blk.19."""
    layout, _ = of_family("llama", num_hidden_layers=12, tie_word_embeddings=False)
    policy = policy_for(layout, {}, {})
    text = llama_cpp.tensor_types(policy, llama_cpp.translate(policy).formats)
    names = tensor_names(text)
    assert len(names) == 12 * 7 + 2 and "output.weight" in names
    for line, name in zip(text.splitlines(), names, strict=True):
        pattern, _, _ = line.partition("=")
        assert [other for other in names if re.search(pattern.lower(), other)] == [name]


def test_a_name_that_lower_case_changes_is_refused(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *a: Shouting(known(*a)))
    with pytest.raises(BadInput, match=re.escape("cannot match the tensor name 'TOKEN_EMBD")):
        export(make_policy({}), tmp_path / "out")


class Shouting:
    def __init__(self, names: Any) -> None:
        self.names = names

    def get_name(self, *arguments: Any, **named: Any) -> Any:
        return self.names.get_name(*arguments, **named).upper()


def test_the_command_names_a_quantized_base(written: Path) -> None:
    """With F16 as the base llama-quantize ignores every line, without a word."""
    command = (written / "quantize.sh").read_text().split()
    assert "--pure" in command and "--tensor-type-file" in command
    assert gguf.LlamaFileType[f"MOSTLY_{command[-1]}"] not in (
        gguf.LlamaFileType.MOSTLY_F16,
        gguf.LlamaFileType.MOSTLY_BF16,
    )
    assert not {"--token-embedding-type", "--output-tensor-type"} & set(command)


@pytest.mark.parametrize(
    ("formats", "message", "code"),
    [
        ({"0.mlp.down_proj": "int4-g64"}, "int4-g64 becomes gguf-q4_k", "SCALE_FORMAT_CHANGED"),
        ({"0.mlp.down_proj": "int7-row"}, "int7-row becomes gguf-q8_0", "WIDTH_PROMOTED"),
        ({"0.mlp.down_proj": "nvfp4"}, "no type for nvfp4", None),
        ({"0.mlp.down_proj": "int4-g64+fp16x8"}, "no type for int4-g64+fp16x8", None),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(
    make_policy: Make, tmp_path: Path, formats: dict[str, str], message: str, code: str | None
) -> None:
    policy = make_policy(formats)
    with pytest.raises(BitsearchError, match=re.escape(message)) as caught:
        export(policy, tmp_path / "out")
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    if code is not None:
        told = export(policy, tmp_path / "out", "tiny", code)
        assert {loss["code"] for loss in told["losses"]} == {code}
        assert told["predicted_bytes"] == told["tensor_bytes"]


@pytest.mark.parametrize("format", ["gguf-q4_k", "gguf-iq4_xs", "gguf-q8_0", "mxfp4"])
def test_a_row_of_broken_blocks_is_refused(
    policy_for: For, hashes: dict[str, str], format: str
) -> None:
    """llama-quantize takes another type for K types there, and stops for others."""
    layout, _ = of_family("llama", hidden_size=72, num_attention_heads=1, head_dim=72)
    policy = policy_for(layout, hashes, {"model.layers.1.self_attn.q_proj": format})
    with pytest.raises(BadInput, match=r"layers\.1\.self_attn\.q_proj.*rows of 72 weights"):
        llama_cpp.translate(policy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("^blk.*=q8_0", "says nothing of token_embd.weight"),
        (".*=q9_9", "'.*=q9_9' is not PATTERN=TYPE"),
        (".*", "'.*' is not PATTERN=TYPE"),
        ("(=q8_0", "'(=q8_0' is not PATTERN=TYPE"),
        (".*=iq2_xs", "model.embed_tokens.weight is IQ2_XS, which bitsearch has no format for"),
    ],
)
def test_tensor_types_that_say_too_little(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "types.txt").write_text(content)
    with pytest.raises(BadInput, match=re.escape(message)):
        llama_cpp.read(tmp_path / "types.txt", TINY)


def test_tensor_types_are_read_as_llama_quantize_does(tmp_path: Path) -> None:
    """Lower-cased, found anywhere, and the first counts."""
    (tmp_path / "types.txt").write_text("ATTN_Q=q8_0 blk\\.[0-2]\\.=q4_K\n.*=bf16\n")
    found = llama_cpp.read(tmp_path / "types.txt", TINY).formats
    assert found["model.layers.0.self_attn.q_proj.weight"].name == "gguf-q8_0"
    assert found["model.layers.5.self_attn.q_proj.weight"].name == "gguf-q8_0"
    assert found["model.layers.2.mlp.down_proj.weight"].name == "gguf-q4_k"
    assert found["model.layers.3.mlp.down_proj.weight"].name == "bf16"


def test_damaged_and_foreign_files(written: Path, tmp_path: Path) -> None:
    content = (written / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "no.gguf").write_bytes(b"nothing of the kind")
    for name in ("cut.gguf", "no.gguf", "missing.gguf"):
        with pytest.raises(BadInput, match=re.escape(name)):
            llama_cpp.read(tmp_path / name, TINY)
    other, _ = of_family("llama", num_hidden_layers=8, tie_word_embeddings=False)
    with pytest.raises(BadInput, match="another model"):
        llama_cpp.read(written / "model.gguf", other)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_one_tensor_a_projection(
    policy_for: For, hashes: dict[str, str], kind: str
) -> None:
    sizes = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4}
    layout, _ = of_family(kind, moe_intermediate_size=32, **sizes)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    policy = policy_for(layout, hashes, {stack: "gguf-q4_0"})
    text = llama_cpp.tensor_types(policy, llama_cpp.translate(policy).formats)
    assert "^blk\\.0\\.ffn_gate_exps\\.weight$=q4_0" in text
    assert "^blk\\.0\\.ffn_up_exps\\.weight$=q4_0" in text and "ffn_gate_inp" not in text


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "another pattern of layers"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "no sliding window"),
        ("llama", {"hidden_act": "gelu"}, "computes silu, not gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
         "type 'yarn' are not written"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    _, config = of_family(kind, **changes)
    with pytest.raises(BadInput, match=message):
        add_model(gguf.GGUFWriter(None, "llama"), config)


def test_unknown_families_are_refused(policy_for: For) -> None:
    layout, _ = of_family("phi")
    with pytest.raises(BadInput, match="model type 'phi' has no map"):
        llama_cpp.translate(policy_for(layout, {}, {}))


def test_factors_of_llama_3_frequencies() -> None:
    """Those of transformers, which divides the frequencies by them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    _, config = of_family("llama", head_dim=128, rope_parameters=rope)
    factors = add_model(gguf.GGUFWriter(None, "llama"), config)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2).double() / 128)
    assert factors is not None and factors.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(factors).double(), plain / theirs.double(),
                               rtol=1e-5, atol=0)  # fmt: skip


def test_pre_tokenizers_unknown_to_llama_cpp_are_refused() -> None:
    content = {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None}
    with pytest.raises(BadInput, match="no pre-tokenizer known here"):
        pre_tokenizer(content)
    tokenizer = AutoTokenizer.from_pretrained(open_layout("tiny")[2].path)
    assert '"Digits"' in tokenizer.backend_tokenizer.to_str()
