"""Calibration, selection and evaluation windows that never overlap.

A text is cut at line ends into three consecutive parts (40, 20 and 40 per
cent); several texts give each their share of the windows. Text given for one
purpose alone is checked against the others line by line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput, UsageError
from bitsearch.texts import TEXTS, builtin_text

if TYPE_CHECKING:
    from torch import Tensor

PURPOSES = ("calibration", "selection", "evaluation")
_SHARES = (0.4, 0.2, 0.4)
_LONG_LINE = 80  # shorter lines recur in unrelated texts


@dataclass(frozen=True, slots=True)
class Corpus:
    """Windows of token ids of one purpose.

    Attributes:
        purpose: calibration, selection or evaluation.
        names: the text that each window comes from, one entry a window.
        tokens: (windows, length) token ids.
        sha256: hash over the ids and their shape.
    """

    purpose: str
    names: tuple[str, ...]
    tokens: Tensor
    sha256: str

    def __len__(self) -> int:
        return len(self.names)

    def describe(self) -> dict[str, Any]:
        """What identifies the corpus in a file."""
        return {
            "texts": sorted(set(self.names)),
            "windows": int(self.tokens.shape[0]),
            "length": int(self.tokens.shape[1]),
            "sha256": self.sha256,
        }


@dataclass(frozen=True, slots=True)
class TextPlan:
    """Which text serves which purpose, and how much of it.

    Attributes:
        texts: built-in names or files that are cut into three parts.
        own: a text used whole for one purpose, by purpose.
        length: tokens of a window.
        windows: number of windows by purpose.
    """

    texts: tuple[str, ...]
    own: dict[str, str]
    length: int
    windows: dict[str, int]


def load_corpora(plan: TextPlan, tokenizer: Any, vocabulary: int) -> dict[str, Corpus]:
    """The three corpora of a plan, checked to share no long line.

    Args:
        plan: texts and sizes.
        tokenizer: the model's tokenizer.
        vocabulary: rows of the model's embedding.

    Raises:
        BadInput: a text is missing, empty, too short, or overlaps another part.
    """
    parts = {purpose: _parts(plan, purpose) for purpose in PURPOSES}
    _check_disjoint(parts)
    return {
        purpose: make_corpus(
            purpose, parts[purpose], tokenizer, plan.length, plan.windows[purpose], vocabulary
        )
        for purpose in PURPOSES
    }


def make_corpus(
    purpose: str,
    texts: Sequence[tuple[str, str]],
    tokenizer: Any,
    length: int,
    windows: int,
    vocabulary: int,
) -> Corpus:
    """Windows spread evenly over (name, text) pairs; without overlap.

    A beginning-of-text token starts each window where the tokenizer adds one.

    Raises:
        BadInput: a text is too short for its share of windows, or holds tokens
            that the model's embedding lacks.
    """
    import torch

    start = _leading_token(tokenizer)
    body = length - len(start)
    rows: list[list[int]] = []
    names: list[str] = []
    for index, (name, text) in enumerate(texts):
        share = windows // len(texts) + (index < windows % len(texts))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        available = len(ids) // body
        if available < share:
            raise BadInput(
                f"the {purpose} text '{name}' has {len(ids)} tokens, but {share} windows of "
                f"{length} are asked for; give a longer text, or fewer or shorter windows"
            )
        for row in range(share):
            begin = (row * available // share) * body
            rows.append([*start, *ids[begin : begin + body]])
            names.append(name)
    tokens = torch.tensor(rows, dtype=torch.int64)
    if int(tokens.max()) >= vocabulary:
        raise BadInput(
            f"the tokenizer gives id {int(tokens.max())}, but the model has {vocabulary} "
            "embedding rows: the tokenizer does not belong to this model"
        )
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().tobytes())
    return Corpus(purpose, tuple(names), tokens, digest.hexdigest())


def read_text(reference: str) -> str:
    """A built-in text by name, or a UTF-8 file.

    Raises:
        BadInput: no such text, not UTF-8, or empty.
    """
    if reference in TEXTS:
        return builtin_text(reference)
    path = Path(reference)
    if not path.is_file():
        raise BadInput(
            f"no text '{reference}': give a UTF-8 file or one of {', '.join(sorted(TEXTS))}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"text file {path} is not UTF-8 (byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise BadInput(f"text file {path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise BadInput(f"text file {path} is empty; give a text of some thousand words")
    return text


def _parts(plan: TextPlan, purpose: str) -> list[tuple[str, str]]:
    """(name, text) pairs that serve a purpose."""
    if purpose in plan.own:
        return [(plan.own[purpose], read_text(plan.own[purpose]))]
    if not plan.texts:
        raise UsageError(f"no text for {purpose}: give --text, or --{purpose}-text")
    return [(name, _cut(read_text(name), PURPOSES.index(purpose))) for name in plan.texts]


def _cut(text: str, part: int) -> str:
    """The part of a text at its share of characters, whole lines only."""
    lines = text.splitlines(keepends=True)
    total = sum(map(len, lines))
    low, high = sum(_SHARES[:part]) * total, sum(_SHARES[: part + 1]) * total
    chosen: list[str] = []
    position = 0
    for line in lines:
        if low <= position < high:
            chosen.append(line)
        position += len(line)
    return "".join(chosen)


def _check_disjoint(parts: dict[str, list[tuple[str, str]]]) -> None:
    """Refuse long lines that recur in another part; most repeat by chance of the source."""
    lines = {
        purpose: {
            line.strip()
            for _, text in texts
            for line in text.splitlines()
            if len(line.strip()) >= _LONG_LINE
        }
        for purpose, texts in parts.items()
    }
    for index, first in enumerate(PURPOSES):
        for second in PURPOSES[index + 1 :]:
            shared = lines[first] & lines[second]
            smaller = min(len(lines[first]), len(lines[second]))
            # Natural text repeats a formula now and then; a copied text repeats most of it.
            if smaller and len(shared) > 0.01 * smaller + 3:
                raise BadInput(
                    f"the {first} and {second} texts share {len(shared)} long lines, such as "
                    f"'{min(shared)[:60]}…'; give texts that do not overlap"
                )


def _leading_token(tokenizer: Any) -> list[int]:
    """[bos] where the tokenizer puts one before a text, else []."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []
