"""Diagonal Fisher information of each unit's outputs, candidates replayed locally.

    s = (1/2T) Σ_t Σ_o (∂ℓ/∂y_to)² (Δy_to)²,   Δy = x Δᵀ

ℓ is the loss with labels drawn from the model, so s predicts KL a token. The
score of ModelOpt's AutoQuantize and GEMQ up to a factor: one forward and one
backward pass, then each candidate is replayed on the inputs kept from it. It
sees input correlations and outliers, which weight-side scores do not.

Where the weights meet the logits (the head) the Fisher information of the
softmax is known in closed form and used whole: ½ Var_p(Δz), at fewer tokens. Fused experts are
replayed as a module and scored at its output.

`fisher_output_data` takes the labels from the text instead, as AutoQuantize
does: the empirical Fisher information, which does not predict KL where the
model is wrong about its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsearch.models.decoder import Decoder
from bitsearch.objectives.damage.gradients import sample
from bitsearch.objectives.damage.scoring import Cell, Scoring, by_unit
from bitsearch.objectives.statistics import input_module
from bitsearch.units import Unit

ROWS = 1024  # tokens kept over all windows; more change the ranking little
HEAD_TOKENS = 256  # of them replayed through the head: a vocabulary wide, and used whole
_HEAD_ROWS = 128
_IGNORED = -1  # label of a position without a next token


_BLOCK = 1 << 24  # numbers


class _Store:
    """Keeps small tensors in large blocks.

    One by one they would lie among the far larger ones that come and go with every window,
    in holes that these then no longer fit into. With a model of 135 million weights 48
    windows take 3.5 GB this way, of which 1.2 are kept; without, 64 windows took 20.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0)

    def keep(self, rows: Tensor) -> Tensor:
        """A float32 copy."""
        if rows.numel() > len(self._block):
            size = max(_BLOCK, rows.numel())
            self._block = torch.empty(size, dtype=torch.float32, device=rows.device)
        kept, self._block = self._block[: rows.numel()], self._block[rows.numel() :]
        return kept.view(rows.shape).copy_(rows)


@dataclass(slots=True)
class _Call:
    """One call of a module, at the sampled tokens.

    Attributes:
        input: what is needed to repeat it: rows, token ids, or all arguments.
        rows: the sampled tokens.
        gradient: (tokens, out) loss gradient of the output; None if none came.
    """

    input: Any
    rows: Tensor
    gradient: Tensor | None = None


def fisher_output(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """Predicted KL a token from the output-side Fisher diagonal."""
    return _scores(scoring, cells, drawn=True)


def fisher_output_data(scoring: Scoring, cells: Sequence[Cell]) -> Iterator[tuple[int, int, float]]:
    """`fisher_output` with the text's next tokens for labels: half ModelOpt's gradient score."""
    return _scores(scoring, cells, drawn=False)


def _scores(
    scoring: Scoring, cells: Sequence[Cell], *, drawn: bool
) -> Iterator[tuple[int, int, float]]:
    calls, hidden, tokens = _replayable(scoring, {unit for unit, _ in cells}, drawn)
    for unit, candidates in by_unit(cells):
        scored = scoring.units[unit]
        replay = _linear if scored.kind in ("linear", "fused") else _replay
        for candidate in candidates:
            yield unit, candidate, replay(scoring, scored, candidate, calls, hidden) / tokens


def _replayable(
    scoring: Scoring, units: set[int], drawn: bool
) -> tuple[dict[str, list[_Call]], Tensor, int]:
    """Calls with a gradient by module, last hidden states, and token count."""
    decoder = scoring.decoder
    windows, length = scoring.tokens.shape
    per_window = max(1, min(length, ROWS // windows))
    replayed = [scoring.units[unit] for unit in units if scoring.units[unit].kind != "head"]
    modules = {matrix.module: unit for unit in replayed for matrix in unit.matrices}
    calls: dict[str, list[_Call]] = {name: [] for name in modules}
    last: list[Tensor] = []
    store = _Store()
    for index, window in enumerate(scoring.tokens.to(decoder.device)):
        generator = scoring.generator(index)
        rows = torch.randperm(length, generator=generator)[:per_window].sort().values
        rows = rows.to(decoder.device)
        embedding = decoder.model.get_input_embeddings()
        hooks = [embedding.register_forward_hook(_require_grad)]
        hooks += [
            decoder.model.get_submodule(name).register_forward_hook(
                _keep(calls[name], store, unit, rows, length), with_kwargs=True
            )
            for name, unit in modules.items()
        ]
        try:
            with torch.enable_grad():
                hidden = decoder.hidden(window[None])
            # The last position of a window has no next token: its label is ignored.
            labels = None if drawn else F.pad(window[1:], (0, 1), value=_IGNORED)
            hidden.backward(_loss_gradient(decoder, hidden[0].detach(), generator, labels)[None])
        finally:
            for hook in hooks:
                hook.remove()
        last.append(hidden[0].detach()[rows])
    touched = {
        name: [call for call in made if call.gradient is not None] for name, made in calls.items()
    }
    return touched, torch.cat(last), windows * per_window


def _keep(
    calls: list[_Call], store: _Store, unit: Unit, rows: Tensor, length: int
) -> Callable[..., None]:
    """A forward hook that keeps a module's input and the gradient of its output."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        kept: Any = (_detached(args), _detached(kwargs))
        if unit.kind == "embedding":
            kept = args[0].flatten()[rows]
        elif unit.kind != "experts":
            state = args[0] if args else next(iter(kwargs.values()))
            kept = store.keep(_sampled(state, rows, length))
        call = _Call(kept, rows)
        calls.append(call)

        def note(gradient: Tensor) -> None:
            call.gradient = store.keep(_sampled(gradient, rows, length))

        if output.requires_grad:
            output.register_hook(note)

    return hook


def _sampled(state: Tensor, rows: Tensor, length: int) -> Tensor:
    """Float32 rows of some tokens; of each copy, where a window is repeated for every expert."""
    copies = state.detach().reshape(-1, length, state.shape[-1])
    return copies[:, rows].flatten(0, 1).float()


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Start the graph at the embedding's output: no weight needs a gradient."""
    return output if output.requires_grad else output.requires_grad_(True)


def _loss_gradient(
    decoder: Decoder, hidden: Tensor, generator: torch.Generator, labels: Tensor | None
) -> Tensor:
    """∂ℓ/∂h of (length, width) last hidden states, ℓ summed over (length,) or sampled labels."""
    gradients = []
    for start, rows in enumerate(hidden.split(_HEAD_ROWS)):
        rows = rows.requires_grad_(True)
        with torch.enable_grad():
            logits = decoder.logits(rows)
            if labels is None:
                chosen = sample(logits, generator)
            else:
                chosen = labels[start * _HEAD_ROWS :][: len(rows)]
            loss = F.cross_entropy(logits, chosen, reduction="sum", ignore_index=_IGNORED)
        gradients.append(torch.autograd.grad(loss, rows)[0])
    return torch.cat(gradients)


def _linear(
    scoring: Scoring,
    unit: Unit,
    candidate: int,
    calls: dict[str, list[_Call]],
    hidden: Tensor,
) -> float:
    """Σ over kept tokens for units whose outputs are matrix products."""
    total = 0.0
    for matrix in unit.matrices:
        error = scoring.error(matrix, candidate).mT
        total += sum(_weighted(call.gradient, call.input @ error) for call in calls[matrix.module])
    return total


@torch.no_grad()
def _replay(
    scoring: Scoring,
    unit: Unit,
    candidate: int,
    calls: dict[str, list[_Call]],
    hidden: Tensor,
) -> float:
    """Σ over kept tokens for embeddings, heads and experts."""
    decoder, matrix = scoring.decoder, unit.matrices[0]
    module = decoder.model.get_submodule(matrix.module)
    made = calls.get(matrix.module, [])
    length = scoring.tokens.shape[1]
    is_head = input_module(decoder, unit) is decoder.head
    before = [_repeat(module, unit, call, length) for call in made]
    entering = hidden[:: -(-len(hidden) // HEAD_TOKENS)] if is_head else hidden[:0]
    total = 0.0
    logits = [decoder.logits(rows) for rows in entering.split(_HEAD_ROWS)]
    with scoring.weights.applied([(unit, scoring.candidates[candidate])]):
        for call, old in zip(made, before, strict=True):
            total += _weighted(call.gradient, _repeat(module, unit, call, length) - old)
        variance = 0.0
        for rows, old in zip(entering.split(_HEAD_ROWS), logits, strict=True):
            change = decoder.logits(rows) - old
            p = old.softmax(-1)
            mean = (p * change).sum(-1)
            part = (p * change.square_()).sum(-1) - mean.square()
            variance += 0.5 * float(part.clamp_(min=0).sum(dtype=torch.float64))
    return total + variance * len(hidden) / max(1, len(entering))


def _repeat(module: nn.Module, unit: Unit, call: _Call, length: int) -> Tensor:
    """The (tokens, width) output of a kept embedding look-up or experts call."""
    if unit.kind == "embedding":
        looked_up: Tensor = module(call.input)
        return looked_up.float()
    args, kwargs = call.input
    return _sampled(module(*args, **kwargs), call.rows, length)


def _weighted(gradient: Tensor | None, change: Tensor) -> float:
    """½ Σ g² Δy²."""
    if gradient is None:
        return 0.0
    return 0.5 * float(change.mul_(gradient).square_().sum(dtype=torch.float64))


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value
