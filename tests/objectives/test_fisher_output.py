"""The output-side Fisher diagonal: same labels, exact expectation, and what it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from bitsearch.objectives.damage import fisher_output as module
from bitsearch.objectives.damage.fisher_output import fisher_output, fisher_output_data
from bitsearch.objectives.damage.gradients import sample
from bitsearch.objectives.damage.kl import kl


def seen(
    case: Any, scoring: Any, names: list[str], data: bool = False
) -> dict[str, tuple[list[Any], Tensor]]:
    """Arguments of each module by window, and ∂ℓ/∂y of shape (windows, …, out).

    Labels are drawn from the model, or the text's next tokens if `data`.
    """
    names = list(dict.fromkeys(names))  # one hook where units share a module
    arguments: dict[str, list[Any]] = {name: [] for name in names}
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            arguments[name].append((tuple(a.detach() for a in args), kwargs))
            output.retain_grad()
            outputs[name] = output

        return hook

    hooks = [
        case.model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
        for name in names
    ]
    case.model.requires_grad_(True)
    length = case.tokens.shape[1]
    for index, window in enumerate(case.tokens):
        generator = scoring.generator(index)
        torch.randperm(length, generator=generator)  # which tokens are kept is drawn first
        logits = case.model(input_ids=window[None]).logits[0]
        if data:
            F.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        else:
            F.cross_entropy(logits, sample(logits.float(), generator), reduction="sum").backward()
        for name in names:
            gradients[name].append(outputs[name].grad)
    case.model.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    return {name: (arguments[name], torch.stack(gradients[name])) for name in names}


def variance_term(case: Any, hidden: Tensor, head: Tensor, change: Tensor) -> float:
    """Mean over tokens of ½ Var_p(Δz), for a head without scale or cap."""
    p = (hidden @ head.T).softmax(-1)
    moved = hidden @ change.T
    mean = (p * moved).sum(-1, keepdim=True)
    return float(0.5 * (p * (moved - mean).square()).sum(-1).mean())


@torch.no_grad()
def last_hidden(case: Any) -> Tensor:
    """(windows, length, width) states that enter the head."""
    return case.decoder.hidden(case.tokens)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "phi3"])
def test_linear_layers_equal_explicit_gradients(family: str, data: bool, case_of: Any) -> None:
    case = case_of(family, dtype=torch.float64)
    scoring = case.scoring(seed=3)
    units = [i for i, unit in enumerate(case.units) if unit.kind in ("linear", "fused")]
    cells = [(unit, c) for unit in units for c in (0, 1)]
    names = [m.module for unit in units for m in case.units[unit].matrices]
    kept = seen(case, scoring, names, data)
    found = list((fisher_output_data if data else fisher_output)(scoring, cells))
    assert [cell[:2] for cell in found] == cells
    for unit, candidate, value in found:
        expected = 0.0
        for matrix in case.units[unit].matrices:
            arguments, gradients = kept[matrix.module]
            x = torch.stack([args[0] for args, _ in arguments]).flatten(0, -2)
            moved = x @ scoring.error(matrix, candidate).double().T
            squares = gradients.flatten(0, -2).square() * moved.square()
            expected += 0.5 * float(squares.sum()) / case.tokens.numel()
        assert expected > 0
        assert value == pytest.approx(expected, rel=1e-3)


def test_expectation_is_the_exact_fisher_information(minute: Any) -> None:
    """Over 600 windows of the same text, of which 1 of 5 tokens each is kept."""
    case = minute(num_hidden_layers=1)
    draws, length = 600, case.tokens.shape[1]
    assert module.ROWS // draws == 1
    scoring = case.scoring("int2-g4", tokens=case.tokens[:1].expand(draws, -1))
    units = [i for i, unit in enumerate(case.units) if unit.kind in ("linear", "fused")]
    found = {unit: value for unit, _, value in fisher_output(scoring, [(u, 0) for u in units])}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for unit in units:
        for matrix in case.units[unit].matrices:
            case.model.get_submodule(matrix.module).register_forward_hook(
                lambda _, args, output, name=matrix.name: outputs.update({name: (args[0], output)})
            )
    case.model.requires_grad_(True)
    log_p = case.model(input_ids=case.tokens[:1]).logits[0].log_softmax(-1)
    fisher = dict.fromkeys(outputs, torch.zeros(()))
    for entry in log_p.flatten():
        gradients = torch.autograd.grad(
            entry, [output for _, output in outputs.values()], retain_graph=True
        )
        for name, gradient in zip(outputs, gradients, strict=True):
            fisher[name] = fisher[name] + entry.detach().exp() * gradient.square()
    for unit in units:
        expected = 0.0
        for matrix in case.units[unit].matrices:
            moved = outputs[matrix.name][0].detach() @ scoring.error(matrix, 0).double().T
            expected += 0.5 * float((fisher[matrix.name] * moved.square()).sum()) / length
        assert found[unit] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("length", "tolerance"), [(12, 1e-4), (150, 0.1)])
def test_head_is_half_the_variance_of_the_logits(
    length: int, tolerance: float, case_of: Any
) -> None:
    """In closed form; an estimate from some of them if there are more tokens than it replays."""
    case = case_of(dtype=torch.float64, length=length)
    scoring = case.scoring("int3-g16,int8-g16")
    head = len(case.units) - 1
    (matrix,) = case.units[head].matrices
    weight = scoring.weights.reference(matrix).double()
    values = [value for _, _, value in fisher_output(scoring, [(head, 0), (head, 1)])]
    for candidate, value in enumerate(values):
        change = scoring.error(matrix, candidate).double()
        assert value == pytest.approx(
            variance_term(case, last_hidden(case), weight, change), rel=tolerance
        )
    measured = [value for _, _, value in kl(scoring, [(head, 0), (head, 1)])]
    assert values[0] == pytest.approx(measured[0], rel=0.25)
    assert values[1] == pytest.approx(measured[1], rel=0.02)


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_head_sees_scale_and_soft_cap(family: str, case_of: Any) -> None:
    """Of a tied embedding the part that comes from the head is near the KL of the head alone."""
    case = case_of(family, tie_word_embeddings=False)
    scoring = case.scoring("int6-g16")
    head = len(case.units) - 1
    assert case.units[head].kind == "head"
    ((_, _, predicted),) = fisher_output(scoring, [(head, 0)])
    ((_, _, measured),) = kl(scoring, [(head, 0)])
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embedding_is_scored_at_its_output(family: str, case_of: Any) -> None:
    """Rows that were looked up; a tied one as the head as well."""
    case = case_of(family, dtype=torch.float64)
    scoring = case.scoring(seed=5)
    (matrix,) = case.units[0].matrices
    _, gradients = seen(case, scoring, [matrix.module])[matrix.module]
    tied = case.decoder.head.weight is case.model.get_parameter(matrix.name)
    assert tied == (family == "gpt2")
    for _, candidate, value in fisher_output(scoring, [(0, 0), (0, 1)]):
        change = scoring.error(matrix, candidate).double()
        moved = F.embedding(case.tokens, change)
        squares = gradients.flatten(0, -2).square() * moved.flatten(0, -2).square()
        expected = 0.5 * float(squares.sum()) / case.tokens.numel()
        if tied:
            weight = scoring.weights.reference(matrix).double()
            expected += variance_term(case, last_hidden(case), weight, change)
        assert value == pytest.approx(expected, rel=1e-3)


def mixture(args: Any, kwargs: Any, gate_up: Tensor, down: Tensor) -> Tensor:
    """What Mixtral's experts compute for (tokens, width) states, one token at a time."""
    state, chosen, shares = [*args, *kwargs.values()]
    rows = []
    for x, experts, weights in zip(state, chosen, shares, strict=True):
        total = torch.zeros_like(x)
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert] @ x).chunk(2)
            total += weight * (down[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@torch.no_grad()
def test_experts_are_scored_at_the_output_of_their_mixture(case_of: Any) -> None:
    case = case_of("mixtral", dtype=torch.float64, num_hidden_layers=2)
    scoring = case.scoring("int2-g16", seed=5)
    units = [i for i, unit in enumerate(case.units) if unit.kind == "experts"]
    assert len(units) == 4
    with torch.enable_grad():
        kept = seen(case, scoring, [case.units[i].matrices[0].module for i in units])
    for unit, _, value in fisher_output(scoring, [(unit, 0) for unit in units]):
        (matrix,) = case.units[unit].matrices
        arguments, gradients = kept[matrix.module]
        experts = case.model.get_submodule(matrix.module)
        before = {"gate_up": experts.gate_up_proj, "down": experts.down_proj}
        place = matrix.role.removeprefix("experts.")
        change = scoring.error(matrix, 0).double().view_as(before[place])
        after = before | {place: before[place] + change}
        expected = 0.0
        for (args, kwargs), gradient in zip(arguments, gradients, strict=True):
            moved = mixture(args, kwargs, **after) - mixture(args, kwargs, **before)
            expected += 0.5 * float((gradient * moved).square().sum()) / case.tokens.numel()
        assert expected > 0
        assert value == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_experts_that_see_a_copy_of_every_token(case_of: Any) -> None:
    """Llama 4 repeats the window for each expert: all copies count, not the first one."""
    case = case_of("llama4_text", dtype=torch.float64, num_hidden_layers=1)
    scoring = case.scoring("int2-g16", seed=5)
    units = [i for i, unit in enumerate(case.units) if unit.kind == "experts"]
    assert len(units) == 2
    with torch.enable_grad():
        kept = seen(case, scoring, [case.units[i].matrices[0].module for i in units])
    for unit, _, value in fisher_output(scoring, [(unit, 0) for unit in units]):
        arguments, gradients = kept[case.units[unit].matrices[0].module]
        experts = case.model.get_submodule(case.units[unit].matrices[0].module)
        before = [experts(*args, **kwargs) for args, kwargs in arguments]
        with scoring.weights.applied([(case.units[unit], scoring.candidates[0])]):
            after = [experts(*args, **kwargs) for args, kwargs in arguments]
        moved = torch.stack(after) - torch.stack(before)
        expected = 0.5 * float((gradients * moved).square().sum()) / case.tokens.numel()
        assert value == pytest.approx(expected, rel=1e-3)
        apart = (gradients * moved).square().unflatten(1, (4, -1)).sum((0, 2, 3))
        assert (apart > 0).sum() > 1


def test_layer_that_is_not_reached_has_no_damage(case_of: Any) -> None:
    case = case_of()
    unit = case.units.index(case.unit("layers.1.mlp.down_proj"))
    case.model.get_submodule("model.layers.1.mlp").forward = torch.zeros_like
    values = [value for _, _, value in fisher_output(case.scoring(), [(unit, 0), (unit - 1, 0)])]
    assert values[1] == 0.0
    other = case.units.index(case.unit("layers.2.mlp.down_proj"))
    assert [value > 0 for _, _, value in fisher_output(case.scoring(), [(other, 0)])] == [True]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_ranks_like_measured_kl(family: str, case_of: Any) -> None:
    """Over all units and 3 widths."""
    predicted, measured = predictions(case_of(family, windows=8, length=64), "int3..5-g16")
    assert spearmanr(predicted, measured).statistic > 0.9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_has_the_size_of_measured_kl(family: str, case_of: Any) -> None:
    """For small errors. (Where these flip the choice of experts no second order holds.)

    Single units may be off by more: errors that tokens have in common add up in
    attention, and the diagonal does not see it.
    """
    predicted, measured = predictions(case_of(family, windows=8, length=64), "int6-g16")
    ratios = predicted / measured
    assert 0.7 < np.median(ratios) < 1.4
    assert np.all((ratios > 0.05) & (ratios < 5))


def predictions(case: Any, formats: str) -> tuple[Any, Any]:
    """Predicted and measured KL of all units in all formats."""
    scoring = case.scoring(formats)
    cells = [(unit, c) for unit in range(len(case.units)) for c in range(len(scoring.candidates))]
    found = [{cell[:2]: cell[2] for cell in score(scoring, cells)} for score in (fisher_output, kl)]
    predicted, measured = (np.array([values[cell] for cell in cells]) for values in found)
    return predicted, measured
