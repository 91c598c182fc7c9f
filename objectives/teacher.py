"""What the unquantized model predicts on fixed windows, to measure others against.

KL is the mean over positions of KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) in
float32, p the reference and q the model as it is now (the
one-at-a-time sensitivity of ZeroQ, CVPR 2020, on real text).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsearch.models.decoder import Decoder
from bitsearch.objectives.memory import MiniBatches, available_bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the positions of each window, all of shape (windows,).

    Attributes:
        kl: KL(reference ‖ model) in nats a token.
        nll: negative log likelihood of the next token in nats.
        top1: share of positions where both models rank the same token first.
    """

    kl: Tensor
    nll: Tensor
    top1: Tensor


class Teacher:
    """Reference predictions on fixed windows, and restarts from any block.

    Args:
        decoder: the model, holding its reference weights now.
        tokens: (windows, length) token ids.
        restart: keep the state entering each block, so that `kl(start=i)` can
            skip the blocks before i.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, tokens: Tensor, *, restart: bool) -> None:
        self.decoder = decoder
        self.tokens = tokens.to(decoder.device)
        windows, length = tokens.shape
        config = decoder.config
        # Attention scores and the widest activations of a block, with slack.
        heads = getattr(config, "num_attention_heads", 8)
        window_bytes = 4 * length * (40 * config.hidden_size + 2 * heads * length)
        free = available_bytes(decoder.device)
        self.batches = MiniBatches(max(1, int(0.2 * free // window_bytes)))
        limit = 65536 if decoder.device.type == "cuda" else 2048
        self.batches.size = min(self.batches.size, max(1, limit // length), windows)
        self._head_rows = max(
            1, (1 << 31 if decoder.device.type == "cuda" else 1 << 28) // (4 * config.vocab_size)
        )
        state_bytes = 4 * windows * length * config.hidden_size * (len(decoder.blocks) + 1)
        store = decoder.device if state_bytes < 0.4 * free else torch.device("cpu")
        parts = list(self.batches.map(windows, lambda part: self._record(part, restart, store)))
        self._entering = [torch.cat(states) for states in zip(*(p[0] for p in parts), strict=True)]
        self._last = torch.cat([last for _, last in parts])
        head = decoder.head
        weight, bias = head.weight, getattr(head, "bias", None)
        self._head = (weight.detach().clone(), None if bias is None else bias.detach().clone())
        vocabulary_bytes = 4 * windows * length * config.vocab_size
        self._log_p: Tensor | None = None
        if vocabulary_bytes < 0.2 * available_bytes(decoder.device):
            self._log_p = torch.cat(
                [self._reference(rows) for rows in self._last.flatten(0, 1).split(self._head_rows)]
            )

    def kl(self, start: int | None = None) -> Tensor:
        """(windows,) KL of the model as it is now; see `measure` for `start`."""
        return self.measure(start, kl_only=True).kl

    @torch.no_grad()
    def measure(self, start: int | None = None, *, kl_only: bool = False) -> Measured:
        """Compare the model as it is now with the reference.

        Args:
            start: first block whose weights differ, or the number of blocks if
                only the head does; None if anything may.
            kl_only: leave `nll` and `top1` at zero.
        """
        if start is not None and not self._entering:
            raise ValueError("this teacher was made without restart=True")
        parts = self.batches.map(len(self.tokens), lambda part: self._measure(part, start, kl_only))
        kl, nll, top1 = zip(*parts, strict=True)
        return Measured(torch.cat(kl), torch.cat(nll), torch.cat(top1))

    def _record(
        self, part: slice, restart: bool, store: torch.device
    ) -> tuple[list[Tensor], Tensor]:
        if not restart:
            return [], self.decoder.hidden(self.tokens[part])
        entering, last = self.decoder.record(self.tokens[part])
        return [state.to(store) for state in entering], last

    def _reference(self, hidden: Tensor) -> Tensor:
        """Reference log-probabilities of (rows, width) last hidden states."""
        weight, bias = self._head
        logits = F.linear(hidden.to(weight.dtype), weight, bias)
        return self.decoder.finish_logits(logits).log_softmax(-1)

    def _measure(
        self, part: slice, start: int | None, kl_only: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.tokens[part]
        if start is None:
            hidden = self.decoder.hidden(tokens)
        elif start == len(self.decoder.blocks):
            hidden = self._last[part]
        else:
            state = self._entering[start][part].to(self.decoder.device)
            hidden = self.decoder.hidden(tokens, start=start, entering=state)
        return self._compare(part, hidden, kl_only)

    @torch.no_grad()
    def kl_of(self, part: slice, hidden: Tensor) -> Tensor:
        """(windows,) KL of the model as it is now, of which the last hidden states are known.

        Args:
            part: the windows, with a start.
            hidden: (windows, length, width) last hidden states of the model.
        """
        return self._compare(part, hidden, True)[0]

    def _compare(self, part: slice, hidden: Tensor, kl_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.tokens[part]
        windows, length = tokens.shape
        hidden = hidden.flatten(0, 1)
        # The last position of a window has no next token: its label is ignored.
        labels = F.pad(tokens[:, 1:], (0, 1), value=-1).flatten()
        first = part.start * length
        kl, nll, top1 = [], [], []
        for begin in range(0, len(hidden), self._head_rows):
            rows = slice(begin, begin + self._head_rows)
            log_q = self.decoder.logits(hidden[rows]).log_softmax(-1)
            if self._log_p is None:
                log_p = self._reference(self._last[part].flatten(0, 1)[rows])
            else:
                log_p = self._log_p[first + begin : first + begin + len(log_q)]
            kl.append(((log_p - log_q).mul_(log_p.exp())).sum(-1))
            if not kl_only:
                nll.append(F.nll_loss(log_q, labels[rows], ignore_index=-1, reduction="none"))
                top1.append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        shape = (windows, length)
        mean_kl = torch.cat(kl).view(shape).mean(1).cpu()
        if kl_only:
            return mean_kl, torch.zeros_like(mean_kl), torch.zeros_like(mean_kl)
        mean_nll = torch.cat(nll).view(shape).sum(1).cpu() / (length - 1)
        return mean_kl, mean_nll, torch.cat(top1).view(shape).mean(1).cpu()
