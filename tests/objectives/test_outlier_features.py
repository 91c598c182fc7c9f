"""LLM.int8()'s rule, counted by hand on the inputs that a model really has."""

from __future__ import annotations

from typing import Any

from bitsearch.objectives.damage.outlier_features import outlier_features
from bitsearch.objectives.damage.scoring import LOWEST, Scoring

FORMATS = "int8-row-sym,int8-row-sym+fp16x2,int8-row-sym+int8x2,int8-row-sym+fp16x31,bf16"


def scored(case: Any) -> dict[tuple[str, int], float]:
    scoring: Scoring = case.scoring(FORMATS)
    cells = [(unit, c) for unit in range(len(case.units)) for c in range(5)]
    return {(case.units[u].name, c): value for u, c, value in outlier_features(scoring, cells)}


def test_columns_beyond_six_that_are_not_kept(case_of: Any, captured: Any) -> None:
    """Seen by hooks of the model's own forward pass; gains make three columns reach 6."""
    case = case_of("llama")
    gain = case.model.get_parameter("model.layers.1.input_layernorm.weight")
    gain[[3, 8, 20]] *= 30.0
    name = "model.layers.1.self_attn.qkv_proj"
    inputs = captured(case, ["model.layers.1.self_attn.q_proj"])["model.layers.1.self_attn.q_proj"]
    reached = (inputs.abs() >= 6).any(0).nonzero()[:, 0].tolist()
    assert reached == [3, 8, 20]
    found, rows = scored(case), 32 + 16 + 16
    assert found[name, 0] == 3 * rows
    assert found[name, 2] == 3 * rows  # kept, but not in 16 bits
    weights, missed = case.scoring(FORMATS).weights, 0
    for matrix in case.unit("layers.1.self_attn.qkv_proj").matrices:
        (part,) = weights.quantized(matrix, case.scoring(FORMATS).candidates[1])
        missed += matrix.out_features * len({3, 8, 20} - set(part.columns.tolist()))
    assert found[name, 1] == missed < 3 * rows
    assert found[name, 4] == 0.0


def test_no_outliers_is_not_the_same_as_not_reached(case_of: Any) -> None:
    case = case_of("llama")
    for name, parameter in case.model.named_parameters():
        if "norm" in name:
            parameter.fill_(0.1)
    found = scored(case)
    assert found["model.layers.0.self_attn.qkv_proj", 0] == LOWEST
    assert found["model.embed_tokens", 0] == LOWEST  # looked up, not multiplied
    assert found["lm_head", 0] == LOWEST and found["lm_head", 4] == 0.0


def test_one_token_is_enough(case_of: Any) -> None:
    """The largest over all windows, not the mean."""
    case = case_of("llama", windows=6)
    scoring = case.scoring(FORMATS)
    cells = [(unit, 0) for unit in range(len(case.units))]
    apart = [
        {u: v for u, _, v in outlier_features(case.scoring(FORMATS, tokens=window[None]), cells)}
        for window in case.tokens
    ]
    for unit, _, value in outlier_features(scoring, cells):
        assert value >= max(window[unit] for window in apart)
