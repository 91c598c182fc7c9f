"""Where text is longer than the tokens kept, the kept ones belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitsearch.objectives.damage import fisher_output as module
from bitsearch.objectives.damage.fisher_output import fisher_output
from bitsearch.objectives.damage.gradients import sample

KEPT = 4


@pytest.fixture
def subsampled(case_of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """4 of the 12 tokens of each of 3 windows are kept."""
    case = case_of(dtype=torch.float64, num_hidden_layers=2)
    monkeypatch.setattr(module, "ROWS", KEPT * len(case.tokens))
    return case


def drawn(case: Any, scoring: Any, window: int) -> tuple[Tensor, torch.Generator]:
    """The tokens kept of a window, and the generator that goes on to draw labels."""
    generator = scoring.generator(window)
    rows = torch.randperm(case.tokens.shape[1], generator=generator)[:KEPT].sort().values
    assert not torch.equal(rows, torch.arange(KEPT))
    return rows, generator


def outputs(case: Any, scoring: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """Of each window: what a module was given and ∂ℓ/∂y, both at the kept tokens."""
    found = []
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(layer: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append((args[0][0], output))

    hook = case.model.get_submodule(name).register_forward_hook(keep)
    case.model.requires_grad_(True)
    for index, window in enumerate(case.tokens):
        rows, generator = drawn(case, scoring, index)
        logits = case.model(input_ids=window[None]).logits[0]
        F.cross_entropy(logits, sample(logits.float(), generator), reduction="sum").backward()
        given, output = kept.pop()
        assert output.grad is not None
        found.append((given.detach()[rows], output.grad[0, rows]))
    case.model.requires_grad_(False)
    hook.remove()
    return found


@pytest.mark.parametrize("place", ["mlp.down_proj", "self_attn.o_proj", "embed_tokens"])
def test_inputs_and_gradients_are_of_the_same_tokens(place: str, subsampled: Any) -> None:
    case = subsampled
    scoring = case.scoring("int2-g16", seed=3)
    index = next(i for i, unit in enumerate(case.units) if unit.name.endswith(place))
    (matrix,) = case.units[index].matrices
    change = scoring.error(matrix, 0).double()
    expected = 0.0
    for given, gradient in outputs(case, scoring, matrix.module):
        moved = F.embedding(given, change) if place == "embed_tokens" else given @ change.T
        expected += 0.5 * float((gradient * moved).square().sum()) / (KEPT * len(case.tokens))
    ((_, _, value),) = fisher_output(scoring, [(index, 0)])
    assert expected > 0
    assert value == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_head_is_scored_at_the_kept_tokens(subsampled: Any) -> None:
    case = subsampled
    scoring = case.scoring("int2-g16", seed=3)
    head = len(case.units) - 1
    change = scoring.error(case.units[head].matrices[0], 0).double()
    hidden = case.decoder.hidden(case.tokens)
    log_p = case.log_probabilities()
    expected = 0.0
    for index in range(len(case.tokens)):
        rows, _ = drawn(case, scoring, index)
        p, moved = log_p[index, rows].exp(), hidden[index, rows] @ change.T
        mean = (p * moved).sum(-1, keepdim=True)
        expected += 0.5 * float((p * (moved - mean).square()).sum()) / (KEPT * len(case.tokens))
    ((_, _, value),) = fisher_output(scoring, [(head, 0)])
    assert value == pytest.approx(expected, rel=1e-4)
