"""A matrix in a format is one tensor, in `measure`, `eval` and `quantize` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitsearch.models.load import load_model
from bitsearch.models.packed import load_packed
from bitsearch.models.source import resolve
from bitsearch.models.weights import read_weight
from bitsearch.policy import load_policy
from bitsearch.restore import assignment, candidate_weights, load_prepared, preparation_of
from bitsearch.session import open_session

FORMATS = "int{3,4}-g16,nf3-g16,int3-g16-fz,nvfp4,bf16"


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("prepare", [(), ("--prepare", "awq")])
def test_every_command_sees_the_same_tensor(
    quantizer: str, prepare: tuple[str, ...], cli: Any, place: Any, tmp_path: Path
) -> None:
    model = load_model(resolve(str(place.model)), dtype="bfloat16").model
    model.save_pretrained(place.model)
    given = ("--candidates", FORMATS, "--quantizer", quantizer, *prepare)
    assert cli(*place.search("5.5bpw", *given)).code == 0
    path, packed, exact = place.run / "policy.json", tmp_path / "packed", tmp_path / "exact"
    policy = load_policy(path)
    for out, how in ((packed, ("--packed",)), (exact, ("--dtype", "float32"))):
        cli("quantize", place.model, "--policy", path, "--out", out, *how)
    unpacked, values = load_packed(packed), load_file(exact / "model.safetensors")
    prepared = load_prepared(
        resolve(str(place.model)), preparation_of(policy, path, None), dtype="float32", device="cpu"
    )
    evaluated = candidate_weights(prepared.model, policy, path, None, cache_bytes=0)
    formats = set()
    with open_session(str(place.run), None, "cpu", {}) as session:
        for unit, format in assignment(policy, prepared.layout):
            (matrix,) = unit.matrices
            measured: Tensor = session.weights.candidate(matrix, format)
            assert torch.equal(evaluated.candidate(matrix, format), measured)
            assert torch.equal(read_weight(unpacked, matrix), measured)
            assert torch.equal(values[matrix.name].float(), measured)
            formats.add(format.name)
    assert len(formats) > 1
