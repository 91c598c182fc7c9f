"""A small random model with its texts, and the command line in this process."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitsearch.cli import main

# Machines differ in speed; what counts is the answer.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

VOCABULARY = 96
PURPOSES = ("calibration", "selection", "evaluation")
SMALL = ("--length", "16", "--windows", "4,4,6", "--diagnostics", "3",
         "--candidates", "int{2,3,4,8}-g16,bf16")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object on stdout, which holds nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def complaint(self, code: int) -> str:
        """The one line on stderr that tells what went wrong."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err and not self.out
        lines = [line for line in self.err.splitlines() if line.startswith("bitsearch: ")]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        return lines[0]


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `bitsearch …` in this process, as the installed command does."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["bitsearch", *map(str, arguments)])
        capsys.readouterr()
        with own_logging():
            try:
                main()
            except SystemExit as done:
                code = 0 if done.code is None else int(done.code)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run


@contextmanager
def own_logging() -> Iterator[None]:
    """A fresh root logger, which the command sets up for the stderr of the moment."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = handlers


def make_model(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A random Llama of two blocks with a word-level tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Words w3, w4, … after the special tokens."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, size))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_texts(folder: Path) -> None:
    """A text of random words for each purpose, and one for all."""
    for seed, name in enumerate((*PURPOSES, "common")):
        rng = random.Random(seed)
        lines = (" ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(30)) for _ in range(40))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Workplace:
    """A folder with a model and texts.

    Attributes:
        path: holds `model`, a text file a purpose, and `run` once something was searched.
    """

    path: Path

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.path / "model"

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.path / "run"

    def text(self, name: str) -> Path:
        """A text file."""
        return self.path / f"{name}.txt"

    def search(self, budget: str = "4.5bpw", *more: object) -> tuple[object, ...]:
        """Arguments of a quick search."""
        texts = [a for p in PURPOSES for a in (f"--{p}-text", self.text(p))]
        return ("search", self.model, "--budget", budget, "--out", self.run, *texts, *SMALL, *more)


@pytest.fixture(scope="session")
def _untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    make_model(folder / "model")
    make_texts(folder)
    return folder


@pytest.fixture
def place(_untouched: Path, tmp_path: Path) -> Workplace:
    """A model and texts of one's own."""
    shutil.copytree(_untouched, tmp_path / "place")
    return Workplace(tmp_path / "place")


@pytest.fixture(scope="session")
def _searched(_untouched: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A finished search: where its model lies, its run, and its result."""
    from bitsearch.search import Request, search
    from bitsearch.session import open_session

    place = Workplace(_untouched)
    given = {
        "own_texts": {purpose: str(place.text(purpose)) for purpose in PURPOSES},
        "length": 16,
        "windows": "4,4,6",
        "candidates": SMALL[-1],
    }
    path = _untouched.parent / "searched"
    with open_session(str(place.model), path, "cpu", given) as session:
        result = search(
            session, Request(("4.5bpw",), "fisher_output", "pareto_dp", 3), lambda *_: None
        )
    return _untouched, path, result


@dataclass(frozen=True)
class Searched:
    """A finished run of one's own: its folder, its result, and its model and texts."""

    run: Path
    result: dict[str, Any]
    place: Workplace


@pytest.fixture
def searched(_searched: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> Searched:
    """A copy of a finished run."""
    folder, run, result = _searched
    shutil.copytree(run, tmp_path / "run")
    return Searched(tmp_path / "run", result, Workplace(folder))
