"""A tokenizer of transformers as the metadata of a GGUF file.

llama.cpp does not run a tokenizer's own pre-tokenizer: it knows a list of them by name.
A byte-level BPE is therefore recognised by the normalizer and pre-tokenizer that its
`tokenizer.json` declares, and refused if it is none of those. A BPE with byte fallback
(SentencePiece) is written with scores: llama.cpp merges the best-scored pair first, which
is the order of the merges.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import TokenType

from bitsearch.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _BYTES_SPLIT = ("ByteLevel", False), ("ByteLevel", True)

# (normalizer, pre-tokenizers) -> llama.cpp's name, as its `llama-vocab.cpp` spells the same
# regular expressions.
_PRE_TOKENIZERS: Mapping[tuple[str | None, tuple[Any, ...]], str] = {
    (None, (_BYTES_SPLIT,)): "gpt-2",
    (None, (("Digits", True), _BYTES_SPLIT)): "smollm",
    (None, (("Split", _LETTERS + r"\p{N}{1,3}" + _REST), _BYTES)): "llama-bpe",
    ("NFC", (("Split", _LETTERS + r"\p{N}" + _REST), _BYTES)): "qwen2",
}
_NO_SCORE = -1e6


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add the vocabulary, merges, special tokens and chat template.

    Args:
        writer: of the file.
        tokenizer: of the model.
        rows: of the embedding; tokens beyond are left out, missing ones filled in.

    Raises:
        BadInput: llama.cpp has no tokenizer that splits text as this one does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        file = Path(scratch) / "tokenizer.json"
        if not file.is_file():
            raise BadInput(f"a {type(tokenizer).__name__} has no tokenizer.json, and no GGUF form")
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content["model"]
        if model.get("type") != "BPE":
            raise BadInput(f"a {model.get('type')} tokenizer has no GGUF form here, only BPE has")
        tokens, types = _tokens(content, rows)
        pieces = bool(model.get("byte_fallback"))
        if pieces:
            _check_pieces(content)
        writer.add_tokenizer_model("llama" if pieces else "gpt2")
        writer.add_tokenizer_pre("default" if pieces else pre_tokenizer(content))
        writer.add_token_list(tokens)
        if pieces:
            writer.add_token_scores(_scores(model["merges"], tokens))
            writer.add_add_space_prefix(_prefixes_space(content))
        writer.add_token_types(types)
        special = gguf.SpecialVocab(scratch, load_merges=not pieces, n_vocab=rows)
        # What the file leaves unsaid, llama.cpp decides by the pre-tokenizer's name.
        special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
        special.add_to_gguf(writer, quiet=True)


def pre_tokenizer(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of what splits the text, from the content of a `tokenizer.json`.

    Raises:
        BadInput: it has none.
    """
    normalizer = (content.get("normalizer") or {}).get("type")
    steps = tuple(_step(step) for step in _flat(content.get("pre_tokenizer")))
    found = _PRE_TOKENIZERS.get((normalizer, steps))
    if found is None:
        raise BadInput(
            "llama.cpp has no pre-tokenizer known here for this tokenizer "
            f"(normalizer {normalizer}, {steps}); convert the model with llama.cpp's own converter"
        )
    return found


def _flat(step: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return ()
    return tuple(step["pretokenizers"]) if step["type"] == "Sequence" else (step,)


def _step(step: Mapping[str, Any]) -> Any:
    """What decides how a pre-tokenizer splits."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regex)}:
            return ("ByteLevel", regex)
        case {"type": "Digits", "individual_digits": bool(single)}:
            return ("Digits", single)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
            return ("Split", regex) if not step.get("invert") else ("Split", "inverted", regex)
    return json.dumps(step, sort_keys=True)


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each of the `rows` tokens."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    unknown = content["model"].get("unk_token")
    for token, index in content["model"]["vocab"].items():
        if index < rows:
            tokens[index] = token
            types[index] = int(_type(token, content, token == unknown))
    for added in content["added_tokens"]:
        index = added["id"]
        if index < rows:
            control = added["special"]
            types[index] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
            # llama.cpp looks for these in text as it was typed.
            text = added["content"]
            tokens[index] = text if control else text.replace("▁", " ")
    return tokens, types


def _type(token: str, content: Mapping[str, Any], unknown: bool) -> TokenType:
    if unknown:
        return TokenType.UNKNOWN
    byte = content["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
    return TokenType.BYTE if byte else TokenType.NORMAL


def _scores(merges: Sequence[Any], tokens: Sequence[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; the least for all others."""
    ranks: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks[token]) if token in ranks else _NO_SCORE for token in tokens]


def _check_pieces(content: Mapping[str, Any]) -> None:
    """Refuse pieces that end at words: llama.cpp merges across them."""
    for step in _flat(content.get("pre_tokenizer")):
        match step:
            case {"type": "Split", "pattern": {"String": " "}}:  # its normalizer left none
                continue
            case {"type": "Metaspace", "split": False}:
                continue
        raise BadInput(f"llama.cpp cuts text into pieces, but not by {_step(step)}")


def _prefixes_space(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _flat(content.get("pre_tokenizer"))
    )
