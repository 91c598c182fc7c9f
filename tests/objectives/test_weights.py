"""Candidates are put in place exactly, and taken back exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitsearch.errors import BadInput
from bitsearch.formats import BF16, FP16, parse_format
from bitsearch.models.weights import read_weight, write_weight
from bitsearch.objectives.weights import CandidateWeights
from bitsearch.quantizers.rtn import quantize
from bitsearch.space import unit_bytes

INT3 = parse_format("int3-g16")
INT6 = parse_format("int6-row-sym")
FAMILIES = ["llama", "gpt2", "gemma2", "opt", "qwen3_moe", "llama4_text", "gpt_oss"]


def changed(case: Any, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that are not bit for bit as before."""
    now = case.model.named_parameters()
    return {name for name, parameter in now if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_chosen_units_change_and_come_back(
    family: str, dtype: torch.dtype, case_of: Any
) -> None:
    case = case_of(family, dtype=dtype)
    before = case.state()
    weights = case.weights()
    for unit in case.units:
        with weights.applied([(unit, INT3)]):
            assert changed(case, before) == {matrix.name for matrix in unit.matrices}
            for matrix in unit.matrices:
                original = read_matrix(before[matrix.name], matrix)
                expected = quantize(original, INT3).dequantize().to(dtype)
                assert torch.equal(weights.reference(matrix), expected.float())
        assert not changed(case, before)


def read_matrix(stored: Tensor, matrix: Any) -> Tensor:
    """(count·out, in) rows of a stored tensor, expert by expert."""
    stacked = stored if stored.dim() == 3 else stored[None]
    return torch.cat([one.T if matrix.transposed else one for one in stacked]).float()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nf4-g32", "int4-g32"])
def test_every_expert_is_stored_with_what_it_needs(name: str, case_of: Any) -> None:
    """Also where a format has a scale for a whole matrix."""
    case, format = case_of("mixtral"), parse_format(name)
    weights = case.weights()
    for unit in case.units:
        stored = [
            tensor.nbytes
            for matrix in unit.matrices
            for part in weights.quantized(matrix, format)
            for tensor in part.pack().values()
        ]
        assert sum(stored) == unit_bytes(unit, format)


def test_several_units_in_different_formats(case_of: Any) -> None:
    case = case_of("qwen3_moe")
    before = case.state()
    weights = case.weights()
    choice = [(case.units[1], INT3), (case.units[3], INT6), (case.units[-1], BF16)]
    with weights.applied(choice):
        names = {matrix.name for unit, _ in choice for matrix in unit.matrices}
        assert changed(case, before) == names
        for unit, format in choice:
            for matrix in unit.matrices:
                original = read_matrix(before[matrix.name], matrix)
                expected = (
                    original.bfloat16().float()
                    if format is BF16
                    else quantize(original, format).dequantize()
                )
                assert torch.equal(weights.reference(matrix), expected)
    assert not changed(case, before)


def test_sixteen_bit_floats_round_once(case_of: Any) -> None:
    case = case_of()
    matrix = case.units[1].matrices[0]
    original = case.weights().reference(matrix)
    assert torch.equal(case.weights().candidate(matrix, BF16), original.bfloat16().float())
    assert torch.equal(case.weights().candidate(matrix, FP16), original.half().float())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_come_back_after_an_error(family: str, case_of: Any) -> None:
    case = case_of(family)
    before = case.state()
    choice = [(unit, INT3) for unit in case.units]
    with pytest.raises(KeyboardInterrupt), case.weights().applied(choice):
        assert changed(case, before)
        raise KeyboardInterrupt
    assert not changed(case, before)


def test_weights_come_back_after_a_failing_quantizer(case_of: Any) -> None:
    case = case_of()
    before = case.state()
    poor = case.units[-1].matrices[0]

    def picky(weight: Tensor, format: Any, importance: Any) -> Any:
        if weight.shape == (poor.out_features, poor.in_features):
            raise BadInput("no scale fits")
        return quantize(weight, format, importance)

    weights = CandidateWeights(case.model, picky, {}, 1 << 20)
    with (
        pytest.raises(BadInput),
        weights.applied([(case.units[1], INT3), (case.units[-1], INT3)]),
    ):
        raise AssertionError("never entered")
    assert not changed(case, before)


def test_unit_given_twice_comes_back(case_of: Any) -> None:
    case = case_of()
    before = case.state()
    unit = case.units[1]
    with case.weights().applied([(unit, INT3), (unit, INT6)]):
        assert changed(case, before)
    assert not changed(case, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preserved_weights_come_back_bit_for_bit(dtype: torch.dtype, case_of: Any) -> None:
    case = case_of(dtype=dtype)
    before = case.state()
    unit = case.units[1]
    with case.weights().preserved(unit):
        for matrix in unit.matrices:
            case.model.get_parameter(matrix.name).mul_(2)
        assert changed(case, before) == {matrix.name for matrix in unit.matrices}
    assert not changed(case, before)


@pytest.mark.parametrize("room", [0, 4000, 1 << 30])
def test_size_of_the_cache_does_not_matter(room: int, case_of: Any) -> None:
    """A full one gives way, and what was dropped is made again just the same."""
    case = case_of(num_hidden_layers=1)
    matrices = [matrix for unit in case.units for matrix in unit.matrices]
    weights = case.weights(cache_bytes=room)
    for _ in range(2):
        for matrix in [*matrices, *reversed(matrices)]:
            for format in (INT3, INT6):
                expected = quantize(weights.reference(matrix), format).dequantize()
                assert torch.equal(weights.candidate(matrix, format), expected)
    with weights.applied([(unit, INT3) for unit in case.units]):
        for matrix in matrices:
            found = weights.reference(matrix)
            assert len(found.unique()) < matrix.parameters
    kept = sum(part.codes.nbytes for parts in weights._cache.values() for part in parts)
    assert kept <= max(room, max(m.parameters for m in matrices))


def test_a_candidate_is_quantized_once(case_of: Any) -> None:
    case = case_of()
    calls: list[Any] = []

    def counted(weight: Tensor, format: Any, importance: Any) -> Any:
        calls.append(format)
        return quantize(weight, format, importance)

    weights = CandidateWeights(case.model, counted, {}, 1 << 30)
    for _ in range(3):
        with weights.applied([(case.units[2], INT3)]):
            pass
    assert len(calls) == 1


def test_a_returned_candidate_may_be_changed(case_of: Any) -> None:
    case = case_of()
    weights = case.weights()
    matrix = case.units[1].matrices[0]
    expected = weights.candidate(matrix, INT3).clone()
    weights.candidate(matrix, INT3).zero_()
    assert torch.equal(weights.candidate(matrix, INT3), expected)


def test_importance_reaches_the_quantizer(case_of: Any) -> None:
    case = case_of()
    matrix = case.units[1].matrices[0]
    importance = torch.logspace(-2, 2, matrix.in_features)
    weights = CandidateWeights(case.model, quantize, {matrix.name: importance}, 1 << 30)
    expected = quantize(weights.reference(matrix), INT3, importance).dequantize()
    assert torch.equal(weights.candidate(matrix, INT3), expected)
    assert not torch.equal(case.weights().candidate(matrix, INT3), expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_tied_matrices_stay_tied(family: str, case_of: Any) -> None:
    case = case_of(family)
    embedding, head = case.model.get_input_embeddings(), case.model.get_output_embeddings()
    before = case.log_probabilities()
    with case.weights().applied([(case.units[0], INT3)]):
        assert embedding.weight is head.weight
        assert not torch.allclose(case.log_probabilities(), before, atol=1e-3)
    assert embedding.weight is head.weight
    assert torch.equal(case.log_probabilities(), before)


def test_broken_weights_are_refused(case_of: Any) -> None:
    case = case_of()
    matrix = case.units[1].matrices[0]
    case.model.get_parameter(matrix.name)[0, 0] = torch.nan
    with pytest.raises(BadInput, match=rf"{matrix.name} holds NaN"):
        case.weights().candidate(matrix, INT3)


@pytest.mark.parametrize("family", ["gpt2", "llama4_text", "mixtral"])
def test_rows_of_a_matrix_are_its_outputs(family: str, case_of: Any, captured: Any) -> None:
    """Of plain layers, Conv1D and experts: read, write another value, read it back."""
    case = case_of(family)
    for unit in case.units:
        for matrix in unit.matrices:
            stored = case.model.get_parameter(matrix.name)
            assert torch.equal(read_weight(case.model, matrix), read_matrix(stored, matrix))
            value = torch.randn(matrix.count * matrix.out_features, matrix.in_features)
            write_weight(case.model, matrix, value)
            assert torch.equal(read_matrix(stored, matrix), value)
