"""A language model cut at its decoder blocks: record once, restart anywhere.

Restarting skips the blocks before the perturbed one by letting them pass on
their input, so masks and position embeddings stay the model's own. It is
exact: the hidden state that enters the first block to run is the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitsearch.errors import BadInput


class Decoder:
    """Runs a causal language model from any of its blocks on.

    Args:
        model: a transformers causal language model in eval mode.
        blocks: module names of its decoder blocks, in forward order.

    Raises:
        BadInput: the blocks cannot be run one by one (they share more than the
            hidden state), or the logits are not a function of the last hidden
            state that bitsearch knows (linear head, optional scaling, soft cap).
    """

    def __init__(self, model: Any, blocks: Sequence[str]) -> None:
        self.model = model
        self.blocks: list[Any] = [model.get_submodule(name) for name in blocks]
        # The module that holds the list of blocks: the model without its head.
        self._body: Any = model.get_submodule(blocks[0].rpartition(".")[0].rpartition(".")[0])
        self.head: Any = self.model.get_output_embeddings()
        self.config: Any = self.model.config.get_text_config(decoder=True)
        self._scale = getattr(self.config, "logit_scale", None) or 1.0
        self._scale /= getattr(self.config, "logits_scaling", None) or 1.0
        self._cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._returns_tuple = False
        self._check()

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def hidden(self, tokens: Tensor, *, start: int = 0, entering: Tensor | None = None) -> Tensor:
        """Last hidden state (after the final norm) of (batch, length) tokens.

        Args:
            tokens: (batch, length) token ids.
            start: first block to run.
            entering: (batch, length, width) state entering that block; None
                runs the embedding and all blocks.
        """
        with ExitStack() as stack:
            if entering is not None:
                for block in self.blocks[:start]:
                    stack.enter_context(_passing_through(block, self._returns_tuple))
                stack.enter_context(_entered_with(self.blocks[start], entering))
            output = self._body(input_ids=tokens, use_cache=False, return_dict=True)
        state: Tensor = output.last_hidden_state
        return state

    def record(
        self, tokens: Tensor, *, start: int = 0, entering: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The state entering each block from `start` on, and the last hidden state.

        Args:
            tokens: (batch, length) token ids.
            start: first block to run.
            entering: (batch, length, width) state entering that block; None
                runs the embedding and all blocks.
        """
        states: list[Tensor] = [] if entering is None else [entering]

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).detach())

        seen = self.blocks if entering is None else self.blocks[start + 1 :]
        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in seen]
        try:
            last = self.hidden(tokens, start=start, entering=entering)
        finally:
            for hook in hooks:
                hook.remove()
        return states, last

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, width) last hidden states -> (…, vocabulary) float32 logits."""
        return self.finish_logits(self.head(hidden))

    def finish_logits(self, logits: Tensor) -> Tensor:
        """What the model does to the output of its head: scale, then soft cap."""
        logits = logits.float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    @torch.no_grad()
    def _check(self) -> None:
        tokens = torch.arange(4, device=self.device)[None]

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)

        hook = self.blocks[-1].register_forward_hook(note)
        try:
            expected = self.model(input_ids=tokens, use_cache=False).logits.float()
        finally:
            hook.remove()
        name = type(self.model).__name__
        try:
            entering, whole = self.record(tokens)
            last = len(self.blocks) - 1
            restarted = self.hidden(tokens, start=last, entering=entering[last])
        except (AttributeError, LookupError, TypeError) as error:
            raise BadInput(
                f"{name} is not supported: its blocks cannot be run one by one ({error!r})"
            ) from error
        if not _close(whole, restarted):
            raise BadInput(
                f"{name} is not supported: its blocks pass on more than one hidden state"
            )
        if not _close(expected, self.logits(restarted)):
            raise BadInput(
                f"{name} computes its logits in a way that is not supported: "
                "they are not its output embedding applied to the last hidden state"
            )


def _close(expected: Tensor, found: Tensor) -> bool:
    """Whether two results of a 16-bit model are the same up to rounding."""
    if expected.shape != found.shape:
        return False
    return float((expected - found).abs().max()) <= 0.02 * float(expected.abs().max()) + 1e-6


@contextmanager
def _passing_through(block: Any, as_tuple: bool) -> Iterator[None]:
    """Let a block return its input, alone or as the first of a tuple."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return (state,) if as_tuple else state

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


@contextmanager
def _entered_with(block: Any, state: Tensor) -> Iterator[None]:
    """Let a block see `state` in place of the hidden state it is called with."""

    def replace(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    hook = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
