"""Checkpoints of every family: exact bytes, and exactly the weights of the policy."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitsearch import restore
from bitsearch.checkpoint import quantize_model
from bitsearch.errors import BadInput
from bitsearch.formats import parse_format
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.layout import find_layout
from bitsearch.models.load import load_model
from bitsearch.models.packed import load_packed
from bitsearch.models.source import resolve
from bitsearch.policy import (
    Achieved,
    Policy,
    PolicyDamage,
    PolicyFormat,
    PolicyModel,
    PolicyModule,
    PolicyQuantizer,
    load_policy,
    save_policy,
)
from bitsearch.quantizers.rtn import quantize
from bitsearch.units import ModelLayout

FORMATS = ("nvfp4", "int3-g16", "nf4-g32", "bf16", "mxfp4", "gguf-q8_0", "int8-row-sym",
           "fp8", "dialect4-b32", "lut4-row", "int3-g16+fp16x2", "nf4-g32+int8x10%",
           "lut3-row+sparse1%", "int3-g8-s3+sparse2%")  # fmt: skip
APART = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "qwen2_moe", "jamba")


def made_policy(folder: Path) -> Policy:
    """One format after another, for the matrices whose rows it can store."""
    source = resolve(str(folder))
    layout = load_model(source).layout
    names = cycle(FORMATS)
    modules = {}
    for unit in layout.units:
        for m in unit.matrices:
            name = next(n for n in names if parse_format(n).fits(m.in_features))
            size = m.count * parse_format(name).bytes(m.out_features, m.in_features)
            modules[m.name] = PolicyModule(
                format=name, unit=unit.name, role=m.role, block=unit.block, count=m.count,
                shape=(m.out_features, m.in_features), bytes=size,
            )  # fmt: skip
    total = sum(module.bytes for module in modules.values()) + layout.kept_bytes
    formats = {module.format: parse_format(module.format) for module in modules.values()}
    return Policy(
        model=PolicyModel(
            reference=str(folder), revision=None, architecture=layout.architecture,
            model_type=layout.model_type, dtype=layout.dtype, parameters=layout.parameters,
            fingerprint={k: v for k, v in fingerprint(source).items() if v},
            tied=[list(names) for names in layout.tied], fused={}, experts={},
        ),
        formats={
            name: PolicyFormat(
                kind=f.kind, bits=f.bits, group_size=f.group_size, symmetric=f.symmetric
            )
            for name, f in formats.items()
        },
        modules=modules, excluded={}, quantizer=PolicyQuantizer(method="rtn"), calibration=None,
        budgets=[], damage=PolicyDamage(estimator="none", predicted=0.0), provenance={},
        achieved=Achieved(
            bytes=total, kept_bytes=layout.kept_bytes, bpw=8 * total / layout.parameters,
            linear_bpw=None, nominal_bpw=0.0,
        ),
    )  # fmt: skip


def expected(model: PreTrainedModel, policy: Policy) -> dict[str, Tensor]:
    """Every parameter as it should be, in float32, without the code under test."""
    layout = find_layout(model, reference="")
    found = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for unit in layout.units:
        for m in unit.matrices:
            format = policy.format_of(m.name)
            if format.exact:
                found[m.name] = found[m.name].bfloat16().float()
                continue
            stack = found[m.name].reshape(m.count, *found[m.name].shape[-2:])
            stack = stack.transpose(1, 2).contiguous() if m.transposed else stack
            values = torch.stack([quantize(part, format).dequantize() for part in stack])
            values = values.transpose(1, 2) if m.transposed else values
            found[m.name] = values.reshape(found[m.name].shape)
    return found


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().float() for name, p in model.named_parameters()}


def tensor_bytes(file: Path) -> int:
    """What the file holds after its header."""
    with file.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return file.stat().st_size - 8 - int(header)


class Case:
    """A bfloat16 model of a family on disk, and a policy of many formats for it."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
        for p in model.parameters():
            p.data = p.data.bfloat16()
        self.folder, self.path = folder / "model", folder / "policy.json"
        model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        self.model = model
        self.policy = made_policy(self.folder)
        self.path.write_text(save_policy(self.policy))
        self.expected = expected(model, self.policy)

    def quantized(self, **options: Any) -> Path:
        given = {"packed": False, "dtype": None, "statistics": None, "device": "cpu",
                 "force": False, "progress": lambda *_: None}  # fmt: skip
        out = self.folder.parent / "out"
        quantize_model(str(self.folder), self.path, out, **(given | options))
        return out


@pytest.fixture
def case_of(
    configured: Callable[..., Any],
    instantiate: Callable[..., Any],
    tokenizer_of: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., Case]:
    """The case of a family."""

    def make(family: str, **changes: Any) -> Case:
        return Case(instantiate(configured(family, **changes)), tokenizer_of(), tmp_path)

    return make


@pytest.mark.parametrize("packed", [True, False])
def test_read_one_by_one_or_loaded_as_a_whole(
    family: str, packed: bool, case_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is the same, byte for byte, whether a model is in memory or not."""
    case = case_of(family)
    whole: list[str] = []
    open_stored = restore.open_stored

    def counted(*arguments: Any) -> Any:
        found = open_stored(*arguments)
        whole.extend([family] * (found is None))
        return found

    monkeypatch.setattr(restore, "open_stored", counted)
    streamed = content(case.quantized(packed=packed))
    # experts that are stored one by one are put together by transformers
    assert bool(whole) == (family in APART)
    monkeypatch.setattr(restore, "open_stored", lambda *_: None)
    shutil.rmtree(case.folder.parent / "out")
    assert content(case.quantized(packed=packed)) == streamed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_packed_is_exact_in_bytes_and_in_values(case_of: Any, family: str) -> None:
    case = case_of(family)
    out = case.quantized(packed=True)
    buffers = dict(case.model.state_dict())
    for name, _ in case.model.named_parameters(remove_duplicate=False):
        del buffers[name]
    extra = sum(buffer.nbytes for buffer in buffers.values())
    assert extra == 0 or family == "deepseek_v3"
    assert tensor_bytes(out / "packed.safetensors") == case.policy.achieved.bytes + extra

    model = load_packed(out)
    found = parameters(model)
    assert found.keys() == case.expected.keys()
    for name, values in case.expected.items():
        assert torch.equal(found[name], values), name
    for name, buffer in buffers.items():
        assert torch.equal(model.state_dict()[name], buffer), name


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"]
)
def test_fake_quantized_opens_with_transformers(case_of: Any, family: str) -> None:
    case = case_of(family)
    model = AutoModelForCausalLM.from_pretrained(case.quantized())
    found = parameters(model)
    assert found.keys() == case.expected.keys()
    for name, values in case.expected.items():
        assert torch.equal(found[name], values.bfloat16().float()), name
        assert bool(((found[name] - values).abs() <= values.abs() * 2.0**-8).all()), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_float32_holds_the_exact_values(case_of: Any, family: str) -> None:
    case = case_of(family)
    found = parameters(AutoModelForCausalLM.from_pretrained(case.quantized(dtype="float32")))
    for name, values in case.expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_stay(case_of: Any, tied: bool, packed: bool) -> None:
    case = case_of("llama", tie_word_embeddings=tied)
    out = case.quantized(packed=packed)
    model = load_packed(out) if packed else AutoModelForCausalLM.from_pretrained(out)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    stored = [name for file in out.glob("*.safetensors") for name in load_file(file)]
    assert any("lm_head" in name for name in stored) != tied


def test_loading_draws_no_random_numbers(case_of: Any) -> None:
    out = case_of("llama").quantized(packed=True)
    before = torch.get_rng_state()
    load_packed(out, dtype="auto")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_packed_folder_is_a_model(case_of: Any) -> None:
    case = case_of("gpt2")
    loaded = load_model(resolve(str(case.quantized(packed=True))))
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    layout: ModelLayout = loaded.layout
    assert layout.parameters == case.policy.model.parameters
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(loaded.path)


def change(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a file of tensors under the header that it has."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=header)


def test_damage_is_named(case_of: Any) -> None:
    case = case_of("llama")
    out = case.quantized(packed=True)
    file, policy = out / "packed.safetensors", out / "policy.json"
    content, said = file.read_bytes(), policy.read_bytes()
    first = next(iter(load_policy(policy).modules))
    kept = "model.norm.weight"

    def refused(message: str) -> None:
        with pytest.raises(BadInput, match=message):
            load_packed(out)
        file.write_bytes(content)
        policy.write_bytes(said)

    for edit, message in (
        (lambda t: t.pop(kept), kept),
        (lambda t: t.pop(next(k for k in t if k.startswith(f"{first}/"))), f"{first} is not"),
        (lambda t: t.update(more=torch.zeros(1)), "1 unknown tensors, e.g. 'more'"),
        (lambda t: t.update({kept: torch.zeros(3)}), rf"{kept} is \[3\]"),
    ):
        change(file, edit)
        refused(message)
    file.write_bytes(content[:-1])
    refused("is damaged or missing")
    save_file(load_file(file), file, metadata={"schema": "bitsearch.packed/9"})
    refused("has schema 'bitsearch.packed/9'")
    policy.write_bytes(said + b"\n")
    refused("is not the policy that")
    assert load_packed(out) is not None
