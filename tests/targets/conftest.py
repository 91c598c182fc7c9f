"""Other tools, each in an environment of its own, made when it is missing.

Environments lie in `$BITSEARCH_TARGET_ENVS`, by default `~/.cache/bitsearch/targets`, one
folder for each file of `environments/`; a changed file makes its environment anew. Nothing
is mocked: what a test says of a tool, the tool said itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from bitsearch.formats import parse_format
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.load import open_layout
from bitsearch.policy import save_policy

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "targets" / "README.md"
_HEAD = "| target | tool | check | result |\n|---|---|---|---|\n"  # the rest of the page is rows
_MINUTES = 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these are slow, and install packages."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.network)


@dataclass(frozen=True)
class Environment:
    """An environment with other tools.

    Attributes:
        path: of the environment.
    """

    path: Path

    def run(self, script: str, *arguments: object, **variables: str) -> Any:
        """What a script of `runners/` prints after the word RESULT, from JSON."""
        done = self.call([str(HERE / "runners" / script), *map(str, arguments)], **variables)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(lines[-1].removeprefix("RESULT "))

    def call(self, arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """A run of its Python, away from this checkout."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [str(self.path / "bin" / "python"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * _MINUTES,
            env=kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | variables,
        )

    def version(self, package: str) -> str:
        """The installed version of a package."""
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return f"{package} {self.call(['-c', code]).stdout.strip()}"


@pytest.fixture(scope="session")
def environments() -> Path:
    """The folder of all environments, and of what else is kept between runs."""
    chosen = os.environ.get("BITSEARCH_TARGET_ENVS") or "~/.cache/bitsearch/targets"
    return Path(chosen).expanduser()


@pytest.fixture(scope="session")
def searched_for(environments: Path) -> Callable[..., Path]:
    """The policy of a real search for a target; its run is kept, and resumed."""
    from bitsearch.search import Request, search
    from bitsearch.session import open_session

    def find(target: str, model: str, budget: str, **given: Any) -> Path:
        run = environments / f"searched-{target}-{model}"
        settings = {"target": target, "length": 256, "windows": "2,2,4", **given}
        with open_session(model, run, "cpu", settings) as session:
            search(session, Request((budget,), "fisher_output", "pareto_dp", 0), lambda *_: None)
        return run / "policy.json"

    return find


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """What models are asked to continue."""
    return (
        "The capital of France is",
        "Once upon a time, there was a little",
        "In 1905, Albert Einstein published",
        "def fibonacci(n):\n",
        "Water boils at",
        "The mitochondria is",
        "To bake a loaf of bread, first",
        "The history of the Roman Empire begins",
    )


@pytest.fixture(scope="session")
def environment(environments: Path) -> Callable[[str], Environment]:
    """The environment of a file in `environments/`, by its name."""

    def make(name: str) -> Environment:
        listed = HERE / "environments" / f"{name}.txt"
        path = environments / name
        done = path / "requirements.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not done.is_file() or done.read_text() != listed.read_text():
                shutil.rmtree(path, ignore_errors=True)
                _make(path, listed)
                shutil.copy(listed, done)
        return Environment(path)

    return make


def _make(path: Path, listed: Path) -> None:
    """A fresh environment; packages that a requirements file says to take out are taken out."""
    pip = [str(path / "bin" / "python"), "-m", "pip", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    subprocess.run([*pip, "install", "--requirement", str(listed)], check=True)
    out = [
        name
        for line in listed.read_text().splitlines()
        if line.startswith("# without ")
        for name in line.split()[2:]
    ]
    if out:
        subprocess.run([*pip, "uninstall", "--yes", *out], check=True)


@pytest.fixture
def record() -> Iterator[Callable[[str, str, str, str], None]]:
    """Keeps a row of the table of results: target, tool and version, check, result."""
    rows: dict[tuple[str, str, str], str] = {}

    def keep(target: str, tool: str, check: str, result: str) -> None:
        rows[target, tool, check] = result

    yield keep
    if not rows:
        return
    with FileLock(f"{RESULTS}.lock"):
        kept = dict(_rows())
        # another version of the tool replaces its row
        fresh = {(target, check, tool.partition(" ")[0]) for target, tool, check in rows}
        kept = {
            key: result
            for key, result in kept.items()
            if (key[0], key[2], key[1].partition(" ")[0]) not in fresh
        } | rows
        lines = (f"| {' | '.join([*key, kept[key]])} |\n" for key in sorted(kept))
        page = RESULTS.read_text(encoding="utf-8").partition(_HEAD)[0]
        RESULTS.write_text(page + _HEAD + "".join(lines), encoding="utf-8")
    Path(f"{RESULTS}.lock").unlink(missing_ok=True)


def _rows() -> Iterator[tuple[tuple[str, str, str], str]]:
    """The rows that are in the table already."""
    for line in RESULTS.read_text(encoding="utf-8").partition(_HEAD)[2].splitlines():
        target, tool, check, result = (cell.strip() for cell in line.strip("|").split("|"))
        yield (target, tool, check), result


Make = Callable[..., Path]


@pytest.fixture
def make_policy(tmp_path: Path) -> Make:
    """Writes a policy: formats by module name, in a block without `model.layers.`."""
    from bitsearch.exporters.base import Reading
    from bitsearch.exporters.pipeline import policy_of

    def make(formats: Mapping[str, str], model: str | Path = "tiny") -> Path:
        layout, _, source = open_layout(str(model))
        hashes = {key: value for key, value in fingerprint(source).items() if value}
        tensors = {m.module: m.name for unit in layout.units for m in unit.matrices}
        named = {
            tensors[name if name in tensors else f"model.layers.{name}"]: parse_format(text)
            for name, text in formats.items()
        }
        path = tmp_path / "policy.json"
        path.write_text(save_policy(policy_of(layout, hashes, Reading(named), {})))
        return path

    return make


@dataclass(frozen=True)
class Fake:
    """The model with the policy's weights, as bitsearch measures it.

    Attributes:
        loaded: float32, on the CPU.
    """

    loaded: Any
    _known: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids."""
        return [list(self.loaded.tokenizer(text)["input_ids"]) for text in texts]

    def tokens(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Greedy continuations; the same ones are not computed twice."""
        key = (str(prompts), count)
        if key not in self._known:
            self._known[key] = list(self._continued(prompts, count))
        return self._known[key]

    def _continued(self, prompts: Sequence[Sequence[int]], count: int) -> Iterator[list[int]]:
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)])
            done = self.loaded.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
            )
            yield done[0, len(prompt) :].tolist()

    def equal(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> int:
        """Tokens of another's continuations before each one's first difference from ours.

        Theirs may end early, where the model ends its text.
        """
        pairs = zip(self.tokens(prompts, max(map(len, continuations))), continuations, strict=True)
        return sum(_alike(mine, theirs) for mine, theirs in pairs)

    def shortfall(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> float:
        """How far a token of another's continuations is below the best one, in logits, at most.

        0 where every token is the model's own choice. Engines round to 16 bits: where two
        tokens are as good as each other, they take either.
        """
        worst = 0.0
        for prompt, found in zip(prompts, continuations, strict=True):
            logits = self._logits([*prompt, *found])[len(prompt) - 1 : -1]
            taken = logits.gather(1, torch.tensor(found)[:, None])[:, 0]
            worst = max(worst, float((logits.amax(1) - taken).max()))
        return worst

    @torch.no_grad()
    def _logits(self, tokens: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = self.loaded.model(torch.tensor([list(tokens)])).logits[0]
        return found


def _alike(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How far two continuations are the same."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((index for index, (one, other) in pairs if one != other), len(theirs))


@pytest.fixture(scope="session")
def fake() -> Callable[[Path, str | Path], Fake]:
    """The model of a policy file, with its weights put in place."""
    from bitsearch.models.load import load_model
    from bitsearch.models.weights import write_weight
    from bitsearch.policy import load_policy
    from bitsearch.score import assignment, candidate_weights

    def make(path: Path, model: str | Path) -> Fake:
        loaded = load_model(open_layout(str(model))[2], dtype="float32")
        policy = load_policy(path)
        weights = candidate_weights(loaded.model, policy, path, None, cache_bytes=0)
        for unit, format in assignment(policy, loaded.layout):
            for matrix in unit.matrices:
                write_weight(loaded.model, matrix, weights.candidate(matrix, format))
        return Fake(loaded)

    return make
