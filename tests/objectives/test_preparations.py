"""Preparations leave the model the same function, and do what their papers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch import preparations
from bitsearch.errors import BadInput
from bitsearch.formats import parse_format, parse_formats
from bitsearch.models.decoder import Decoder
from bitsearch.models.flow import find_norms
from bitsearch.models.layout import find_layout
from bitsearch.models.load import untie_head
from bitsearch.models.preparation import Preparation, Step, load_preparation
from bitsearch.models.weights import read_weight
from bitsearch.objectives.statistics import input_second_moments
from bitsearch.preparations import Method, Scene, prepare
from bitsearch.preparations.hadamard import hadamard, randomized
from bitsearch.preparations.resq import residual_moment
from bitsearch.quantizers.rtn import quantize
from bitsearch.run import atomic_write

FORMATS = "int3-g16,int4-g16,int5-g16,bf16"


def uneven(case: Any) -> Any:
    """The case with gains and biases that are no constants, and a few large columns."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in case.model.named_parameters():
        if parameter.dim() < 2:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name or "ln_" in name:
                parameter[3] += 4.0
    return case


def scene_of(case: Any, *, untie: bool = False, formats: str = FORMATS) -> Scene:
    """What a preparation is given."""
    decoder, layout = case.decoder, case.layout
    if untie:
        untie_head(case.model)
        layout = find_layout(case.model, reference="random")
        decoder = Decoder(case.model, layout.blocks)
    return Scene(decoder, layout, parse_formats(formats), case.tokens, 0, lambda *_: None)


@pytest.mark.parametrize(
    "family",
    ["llama", "phi3", "bloom", "cohere", "granite", "gemma2", "gemma3_text", "gpt2", "opt",
     "qwen3_moe", "mixtral", "gpt_oss"],
)  # fmt: skip
def test_awq_keeps_the_function(family: str, case_of: Any) -> None:
    case = uneven(case_of(family, length=20))
    before, weights = case.log_probabilities(), case.state()
    made = prepare("awq", scene_of(case))
    torch.testing.assert_close(case.log_probabilities(), before, rtol=0, atol=5e-4)
    changed = {n for n, p in case.model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed <= made.steps.keys()  # where nothing is gained, scales are 1
    for block in range(3):
        assert any(f".{block}." in name and weights[name].dim() > 1 for name in changed)


@pytest.mark.parametrize("family", ["llama", "phi3", "granite", "qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("name", "tied"), [("hadamard", True), ("hadamard", False), ("resq", True)]
)
def test_rotation_keeps_the_function(family: str, name: str, tied: bool, case_of: Any) -> None:
    case = uneven(case_of(family, length=20, tie_word_embeddings=tied))
    before, weights = case.log_probabilities(), case.state()
    made = prepare(name, scene_of(case, untie=True))
    torch.testing.assert_close(case.log_probabilities(), before, rtol=0, atol=5e-4)
    embedding = case.model.get_input_embeddings().weight
    assert not torch.equal(embedding, weights["model.embed_tokens.weight"]) and made.untied
    # every gain has gone into what reads it
    gains = [p for n, p in case.model.named_parameters() if "layernorm" in n]
    assert gains and all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("gpt2", "hadamard", "ln_1 subtracts the mean"),
        ("gemma2", "hadamard", "post_attention_layernorm stands after a layer"),
        ("gemma3_text", "resq", "post_attention_layernorm stands after a layer"),
        ("llama4_text", "hadamard", "experts.gate_up_proj reads, or writes to, is not known"),
        ("llama4_text", "awq", "would change what it computes"),
    ],
)
def test_what_cannot_be_exact_is_refused(family: str, name: str, why: str, case_of: Any) -> None:
    with pytest.raises(BadInput, match=why):
        prepare(name, scene_of(uneven(case_of(family)), untie=name != "awq"))


def test_a_width_without_a_hadamard_matrix_is_refused(case_of: Any) -> None:
    case = case_of("llama", hidden_size=36 * 5, num_attention_heads=5, num_key_value_heads=5)
    prepare("hadamard", scene_of(case, untie=True))  # 180 = 179 + 1
    case = case_of("llama", hidden_size=92)
    with pytest.raises(BadInput, match="order 92"):
        prepare("hadamard", scene_of(case, untie=True))


def test_a_preparation_that_changes_the_function_is_refused(
    case_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of()
    name = case.units[1].matrices[0].name
    wrong = Preparation("wrong", False, {name: [Step("scale", 0, "x")]}, {"x": torch.ones(32) * 2})
    method = Method("", lambda scene: wrong, False)
    monkeypatch.setattr(preparations, "load_method", lambda _: method)
    with pytest.raises(BadInput, match="would change what it computes"):
        prepare("wrong", scene_of(case))


def test_norms_and_their_readers(case_of: Any) -> None:
    """The gain's offset, the mean, routers and stacked experts; norms of heads feed no matrix."""
    case = case_of("qwen3_moe")
    norms = {norm.name: norm for norm in find_norms(case.decoder, case.layout)}
    read = [(r.parameter, r.axis) for r in norms["model.layers.0.post_attention_layernorm"].readers]
    assert sorted(read) == [
        ("model.layers.0.mlp.experts.gate_up_proj", 2),
        ("model.layers.0.mlp.gate.weight", 1),
    ]
    assert norms["model.layers.1.self_attn.q_norm"].readers == ()
    assert [r.parameter for r in norms["model.norm"].readers] == ["lm_head.weight"]
    assert {(norm.offset, norm.centred) for norm in norms.values()} == {(0.0, False)}
    case = case_of("gemma2")
    assert {(n.offset, n.centred) for n in find_norms(case.decoder, case.layout)} == {(1.0, False)}
    case = case_of("gpt2")
    (first, *_) = find_norms(case.decoder, case.layout)
    assert (first.offset, first.centred) == (0.0, True)
    assert first.readers[0].axis == 0  # Conv1D


def searched(case: Any, names: list[str], shared: tuple[int, ...] | None = None) -> Tensor:
    """The paper's grid for matrices that read the same input, by the middle format."""
    units = {m.name: unit for unit in case.units for m in unit.matrices}
    unit = units[names[0]]
    moment = input_second_moments(case.decoder, [unit], case.tokens)[unit.name]
    h = moment.diagonal()
    root = h.sqrt() if shared is None else (
        h.reshape(shared).mean(1, keepdim=True).expand(shared).flatten().sqrt()
    )  # fmt: skip
    errors, scales = [], []
    for index in range(20):
        scale = root ** (index / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        total = 0.0
        for name in names:
            (matrix,) = [m for m in units[name].matrices if m.name == name]
            weight = read_weight(case.model, matrix)
            rounded = quantize(weight * scale, parse_format("int4-g16"), h / scale**2)
            delta = rounded.dequantize() / scale - weight
            total += float(torch.trace(delta @ moment @ delta.mT))
        errors.append(total)
        scales.append(scale)
    return scales[min(range(20), key=lambda index: errors[index])]


def test_awq_scales_are_those_of_a_plain_search(case_of: Any) -> None:
    """q/k/v through the norm, o through v with two heads to each, down through up."""
    case = uneven(case_of("llama", length=20))
    at, state = "model.layers.0.", case.state()
    after_norm = searched(case, [f"{at}self_attn.{name}_proj.weight" for name in "qkv"])
    between = searched(case, [f"{at}self_attn.o_proj.weight"], (2, 2, 8))
    gated = searched(case, [f"{at}mlp.down_proj.weight"])
    assert all(float(scale.max() / scale.min()) > 1.2 for scale in (after_norm, between, gated))
    prepare("awq", scene_of(case))
    now = case.state()

    def share(name: str) -> Tensor:
        return now[f"{at}{name}.weight"] / state[f"{at}{name}.weight"]

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected.expand_as(found), rtol=2.0**-7, atol=0)

    close(share("input_layernorm"), 1 / after_norm)
    close(share("self_attn.q_proj"), after_norm)
    close(share("self_attn.o_proj"), between)
    rows = between.reshape(2, 2, 8)[:, 0].flatten()
    close(share("self_attn.v_proj"), after_norm / rows[:, None])
    close(share("mlp.down_proj"), gated)
    after_gate = share("mlp.gate_proj")[0]
    close(share("mlp.up_proj"), after_gate / gated[:, None])
    # gains are stored at 16 bits, and the scales take up the rounding
    gain = now[f"{at}input_layernorm.weight"]
    assert torch.equal(gain, gain.bfloat16().float())
    product = share("input_layernorm") * share("self_attn.q_proj")
    torch.testing.assert_close(product, torch.ones_like(product), rtol=1e-6, atol=0)


def test_awq_lowers_the_error_of_outputs_with_outstanding_columns(case_of: Any) -> None:
    case = uneven(case_of("llama", length=24))
    unit = case.unit("layers.1.self_attn.qkv_proj")

    def error() -> float:
        moment = input_second_moments(case.decoder, [unit], case.tokens)[unit.name]
        total = 0.0
        for matrix in unit.matrices:
            weight = read_weight(case.model, matrix)
            rounded = quantize(weight, parse_format("int3-g16"), moment.diagonal())
            delta = rounded.dequantize() - weight
            total += float((delta @ moment * delta).sum())
        return total

    before = error()
    prepare("awq", scene_of(case, formats="int3-g16,bf16"))
    assert error() < 0.95 * before


@pytest.mark.parametrize(
    "order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 80, 96, 128, 576, 640, 896]
)
def test_hadamard_matrices(order: int) -> None:
    found = hadamard(order)
    assert found is not None and set(found.unique().tolist()) <= {-1, 1}
    assert torch.equal(found @ found.mT, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("order", [3, 5, 6, 9, 10, 18, 66, 9 * 64 + 2])
def test_orders_that_have_no_hadamard_matrix(order: int) -> None:
    assert hadamard(order) is None


def test_rotation_spreads_an_outlying_column() -> None:
    weight = torch.randn(256, 96, generator=torch.Generator().manual_seed(0))
    weight[:, 7] *= 30
    rotation = randomized(96, torch.Generator().manual_seed(1))
    assert rotation is not None
    rotated = weight @ rotation
    assert float(rotated.abs().amax() / rotated.std()) < 0.4 * float(
        weight.abs().amax() / weight.std()
    )
    other = randomized(96, torch.Generator().manual_seed(2))
    assert other is not None and not torch.equal(rotation, other)


def energies(case: Any, role: str) -> list[Tensor]:
    """Mean square of each input column of the matrices of a role, block by block."""
    units = [u for u in case.units if any(m.role == role for m in u.matrices)]
    moments = input_second_moments(case.decoder, units, case.tokens)
    return [moments[unit.name].diagonal() for unit in units]


def test_principal_directions_hold_the_most_energy_that_any_can(case_of: Any) -> None:
    """The last eighth of all normalized states has the sum of the largest eigenvalues."""
    case = uneven(case_of("llama", length=40))
    scene = scene_of(case, untie=True)
    moment = residual_moment(scene)
    before = float(moment.diagonal()[-4:].sum() / moment.trace())
    largest = torch.linalg.eigvalsh(moment)[-4:].sum() / moment.trace()
    prepare("resq", scene)
    moment = residual_moment(scene)
    after = float(moment.diagonal()[-4:].sum() / moment.trace())
    assert after == pytest.approx(float(largest), rel=1e-4) and after > 2 * before
    # the two parts do not hang together, and each is mixed
    assert float(moment[:28, 28:].abs().max()) < 1e-3 * float(moment.diagonal().max())
    assert float(moment[28:, 28:].diagonal().max() / moment[28:, 28:].diagonal().min()) < 2


def test_value_heads_have_bases_of_their_own(case_of: Any) -> None:
    """Two heads read each value head: an eighth of each head's columns leads, for each head."""
    case = uneven(case_of("llama", length=40))
    scene = scene_of(case, untie=True)
    first = energies(case, "attn.o")[0].reshape(4, 8)
    prepare("resq", scene)
    now = energies(case, "attn.o")[0].reshape(4, 8)
    torch.testing.assert_close(now.sum(1), first.sum(1), rtol=1e-4, atol=0)
    pairs = now.reshape(2, 2, 8).sum(1)
    assert bool((pairs[:, 7] >= first.reshape(2, 2, 8).sum(1).max(1).values).all())
    assert bool((pairs[:, 7:] > pairs[:, :7]).all())


def test_the_kept_columns_are_the_principal_ones(case_of: Any) -> None:
    case = uneven(case_of("llama", length=40))
    prepare("resq", scene_of(case, untie=True))
    unit = case.unit("layers.1.self_attn.qkv_proj")
    moment = input_second_moments(case.decoder, [unit], case.tokens)[unit.name]
    weight = read_weight(case.model, unit.matrices[0])
    found = quantize(weight, parse_format("int4-row+int8x12.5%"), moment.diagonal())
    assert found.pack()["columns"].tolist() == [28, 29, 30, 31]


def test_steps_by_hand() -> None:
    """Columns scaled, then rotated by blocks; rows rotated; another parameter set."""
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    steps = {
        "w": [Step("scale", 1, "s"), Step("rotate", 1, "r"), Step("rotate", 0, "r")],
        "b": [Step("set", 0, "s")],
    }
    made = Preparation(
        "by hand", False, steps, {"s": torch.tensor([1.0, 2.0, 3.0, 4.0]), "r": rotation}
    )
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    # scaled: [1 2 3 4], [0 2 0 4]; columns: [−2 1 −4 3], [−2 0 −4 0]; rows: [−row 2], [row 1]
    expected = [[2.0, 0.0, 4.0, 0.0], [-2.0, 1.0, -4.0, 3.0]]
    assert made.changed("w", weight).tolist() == expected
    assert made.changed("b", torch.zeros(4)).tolist() == [1, 2, 3, 4]
    assert made.changed("other", weight) is weight
    # one rotation for each block of two columns
    both = torch.stack([rotation, torch.eye(2)])
    apart = Preparation("by hand", False, {"w": [Step("rotate", 1, "r")]}, {"r": both})
    assert apart.changed("w", weight).tolist() == [[-1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 1.0]]


def test_a_file_holds_the_preparation(case_of: Any, tmp_path: Path) -> None:
    first, second = uneven(case_of()), uneven(case_of())
    made = prepare("hadamard", scene_of(first, untie=True))
    file = tmp_path / "preparation.safetensors"
    atomic_write(file, made.parts())
    again = load_preparation(file)
    assert (again.method, again.untied) == ("hadamard", True)
    again.apply(second.model)
    for (name, one), other in zip(
        first.model.named_parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    atomic_write(file, replace(again, method="other").parts())
    assert load_preparation(file).method == "other"


def test_damaged_files_are_refused(case_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "preparation.safetensors"
    with pytest.raises(BadInput, match="cannot be read"):
        load_preparation(file)
    made = prepare("awq", scene_of(uneven(case_of())))
    content = b"".join(made.parts())
    for damaged in (content[:100], content.replace(b"bitsearch.preparation/1", b"x" * 23)):
        file.write_bytes(damaged)
        with pytest.raises(BadInput):
            load_preparation(file)
    atomic_write(file, made.parts())
    with pytest.raises(BadInput, match="does not fit this model"):
        load_preparation(file).apply(case_of("gpt2").model)
