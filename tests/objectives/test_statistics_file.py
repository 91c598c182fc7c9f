"""Statistics files: what goes in comes out, one second moment at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitsearch.errors import BadInput
from bitsearch.objectives.statistics import (
    input_mean_squares,
    input_second_moments,
    second_moments_in_turn,
)
from bitsearch.objectives.statistics_file import (
    StoredMoments,
    read_mean_squares,
    statistics_parts,
)

CPU = torch.device("cpu")


def written(case: Any, path: Path, room: int = 1 << 30) -> Path:
    """The statistics of a model's units on its text."""
    means, counts = input_mean_squares(case.decoder, case.units, case.tokens)
    seen = [unit for unit in case.units if counts.get(unit.name)]
    moments = second_moments_in_turn(case.decoder, seen, case.tokens, room)
    path.write_bytes(b"".join(statistics_parts("abc", means, seen, moments)))
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_second_moments_equal_those_of_captured_inputs(
    family: str, case_of: Any, captured: Any, tmp_path: Path
) -> None:
    case = case_of(family, dtype=torch.float64)
    stored = StoredMoments(written(case, tmp_path / "s.safetensors"), CPU)
    watched = [
        matrix
        for unit in case.units
        for matrix in unit.matrices
        if unit.kind != "embedding" and matrix.role != "experts.down"
    ]
    inputs = captured(case, [matrix.module for matrix in watched])
    for matrix in watched:
        rows, found = inputs[matrix.module], stored.get(matrix.name)
        assert found is not None and found.matrix.dtype == torch.float32
        expected = rows.mT @ rows / len(rows)
        torch.testing.assert_close(found.matrix.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_seen_has_no_second_moment(case_of: Any, tmp_path: Path) -> None:
    case = case_of("qwen3_moe")
    stored = StoredMoments(written(case, tmp_path / "s.safetensors"), CPU)
    unseen = {
        matrix.name
        for unit in case.units
        for matrix in unit.matrices
        if stored.get(matrix.name) is None
    }
    assert unseen == {
        "model.embed_tokens.weight",
        *(f"model.layers.{index}.mlp.experts.down_proj" for index in range(3)),
    }


def test_little_memory_takes_more_passes_and_gives_the_same_file(
    case_of: Any, tmp_path: Path
) -> None:
    case = case_of()
    whole = written(case, tmp_path / "whole.safetensors").read_bytes()
    assert written(case, tmp_path / "small.safetensors", room=1).read_bytes() == whole


def test_the_library_reads_the_file(case_of: Any, tmp_path: Path) -> None:
    case = case_of()
    path = written(case, tmp_path / "s.safetensors")
    means, _ = input_mean_squares(case.decoder, case.units, case.tokens)
    moments = input_second_moments(case.decoder, case.units, case.tokens)
    found, tensors = read_mean_squares(path, CPU), load_file(path)
    assert found.keys() == means.keys()
    assert all(torch.equal(found[name], means[name]) for name in means)
    assert len(tensors) == len(means) + len(moments)
    for name, moment in moments.items():
        assert torch.equal(tensors[f"{name}:second_moment"], moment)


def test_matrices_of_a_unit_share_what_was_computed(case_of: Any, tmp_path: Path) -> None:
    case = case_of()
    stored = StoredMoments(written(case, tmp_path / "s.safetensors"), CPU)
    query, key, _ = case.units[1].matrices
    assert stored.get(query.name) is stored.get(key.name)


def test_files_that_cannot_be_used_are_refused(case_of: Any, tmp_path: Path) -> None:
    case, path = case_of(), tmp_path / "s.safetensors"
    means, _ = input_mean_squares(case.decoder, case.units, case.tokens)
    path.write_bytes(b"".join(statistics_parts("abc", means)))
    assert read_mean_squares(path, CPU).keys() == means.keys()
    with pytest.raises(BadInput, match="holds no second moments"):
        StoredMoments(path, CPU)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadInput, match="is damaged"):
        read_mean_squares(path, CPU)
    with pytest.raises(BadInput, match="is damaged"):
        StoredMoments(path, CPU)
