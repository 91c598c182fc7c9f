"""One run's model, texts and weights, each made when first needed.

Settings fix the meaning of every number in a run directory. They are stored in
`space.json` when the run is made, and compared whenever it is opened again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitsearch.corpora import Corpus, TextPlan, load_corpora
from bitsearch.errors import BadInput, UsageError
from bitsearch.external import described, open_external
from bitsearch.formats import parse_formats
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.load import LoadedModel, load_model, open_layout
from bitsearch.preparations import Scene, load_method, prepare
from bitsearch.quantizers import load_quantizer, needs_second_moments
from bitsearch.run import PREPARATION, STATISTICS, Run, atomic_write, check_same, file_sha256
from bitsearch.settings import (
    SCHEMA,
    Settings,
    default_settings,
    parse_windows,
    plain,
    refuse_unfused,
    stored_settings,
)
from bitsearch.space import Space, make_space
from bitsearch.targets import load_target
from bitsearch.units import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from bitsearch.models.decoder import Decoder
    from bitsearch.objectives.damage.scoring import Scoring
    from bitsearch.objectives.weights import CandidateWeights

Progress = Callable[[str, int, int], None]  # (stage, done, total)
log = logging.getLogger(__name__)


class Session:
    """A run with its settings; loads what is asked for, once.

    Args:
        run: the open run directory.
        settings: stored in a new run, compared with those of an old one.
        device: where the model runs, e.g. `cpu` or `cuda:0`.

    Raises:
        SettingsMismatch: the run was made with other settings.
        BadInput: the model cannot be opened.
    """

    def __init__(self, run: Run, settings: Settings, device: str) -> None:
        self.run = run
        self.settings = settings
        self.device = device
        path = run.path / "space.json"
        if path.exists():
            check_same(plain(stored_settings(run.path)), plain(settings), path)
        refuse_unfused(settings.target, settings.fuse)
        self.progress: Progress = lambda *_: None
        self._untie = False
        if settings.prepare is not None:
            self._untie = load_method(settings.prepare).unties
            if settings.dtype != "float32":
                raise UsageError(f"--prepare {settings.prepare} needs --dtype float32")
            if settings.external:
                raise UsageError("--external gives weights of the model as it is, not --prepare'd")
        if strange := settings.external.keys() - set(settings.candidates):
            raise UsageError(f"--external {min(strange)}=…: it is no candidate; see --candidates")
        layout, _, self.source = open_layout(
            settings.model, revision=settings.revision, fuse=settings.fuse, untie=self._untie
        )
        self.space: Space = make_space(
            layout,
            parse_formats(",".join(settings.candidates)),
            settings.frozen,
            load_target(settings.target),
        )

    def save(self) -> None:
        """Store the space with its settings, or check that the stored one is the same.

        A new run is stored once its model and its texts have been found good, so that
        a mistyped name does not stick to it.
        """
        space = self.space
        if not (self.run.path / "space.json").exists():
            _ = self._windows
        self.run.settle(
            "space.json",
            {
                "schema": SCHEMA,
                "settings": plain(self.settings),
                "parameters": space.layout.parameters,
                "kept_bytes": space.kept_bytes,
                "candidates": [candidate.name for candidate in space.candidates],
                "units": [
                    {
                        "name": unit.name,
                        "kind": unit.kind,
                        "block": unit.block,
                        "parameters": unit.parameters,
                        "tensors": [matrix.name for matrix in unit.matrices],
                        "allowed": [bool(a) for a in allowed],
                    }
                    for unit, allowed in zip(space.units, space.allowed, strict=True)
                ],
            },
        )

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the model's configuration and tensors; settled with the run."""
        found = {key: value for key, value in fingerprint(self.loaded_source).items() if value}
        self.run.settle("model.json", found)
        return found

    @cached_property
    def loaded_source(self) -> Any:
        """The model's files, weights included; fetched if they are on a hub."""
        from bitsearch.models.source import with_weights

        return with_weights(self.source)

    @cached_property
    def _opened(self) -> LoadedModel:
        """The model with its weights, before any preparation."""
        log.info("loading %s", self.settings.model)
        return load_model(
            self.loaded_source,
            dtype=self.settings.dtype,
            device=self.device,
            fuse=self.settings.fuse,
            untie=self._untie,
        )

    @cached_property
    def decoder(self) -> Decoder:
        """The prepared model, cut at its blocks."""
        from bitsearch.models.decoder import Decoder

        decoder = Decoder(self._opened.model, self.space.layout.blocks)
        if self.settings.prepare is not None:
            self._prepare(decoder, self.settings.prepare)
        return decoder

    def _prepare(self, decoder: Decoder, name: str) -> None:
        """Apply the stored preparation, or find it and store it."""
        from bitsearch.models.preparation import load_preparation

        path = self.run.path / PREPARATION
        if path.exists():
            load_preparation(path).apply(decoder.model)
            return
        scene = Scene(
            decoder,
            self.space.layout,
            self.space.candidates,
            self.corpora["calibration"].tokens,
            self.settings.seed,
            partial(self.progress, f"preparation ({name})"),
        )
        atomic_write(path, prepare(name, scene).parts())

    @cached_property
    def preparation_sha256(self) -> str | None:
        """Hash of the preparation, if there is one."""
        if self.settings.prepare is None:
            return None
        _ = self.decoder
        return file_sha256(self.run.path / PREPARATION)

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        """Calibration, selection and evaluation windows; settled with the run."""
        corpora = self._windows
        self.run.settle("corpora.json", {p: corpus.describe() for p, corpus in corpora.items()})
        return corpora

    @cached_property
    def _windows(self) -> dict[str, Corpus]:
        settings = self.settings
        plan = TextPlan(settings.texts, settings.own_texts, settings.length, settings.windows)
        return load_corpora(plan, self._opened.tokenizer, embedding_rows(self._opened.model))

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """Mean squares of each matrix's input columns on calibration text."""
        from bitsearch.objectives.statistics_file import read_mean_squares

        path = self.run.path / STATISTICS
        if not path.exists():
            self._gather(path)
        try:
            return read_mean_squares(path, self.device)
        except BadInput as error:
            raise BadInput(f"{error}; delete it, and the tables, to measure anew") from error

    def _gather(self, path: Path) -> None:
        """Write the input statistics that the quantizer needs."""
        from bitsearch.objectives.memory import available_bytes
        from bitsearch.objectives.statistics import input_mean_squares, second_moments_in_turn
        from bitsearch.objectives.statistics_file import statistics_parts

        decoder, units, calibration = self.decoder, self.space.units, self.corpora["calibration"]
        means, reached = input_mean_squares(decoder, units, calibration.tokens)
        for name, count in reached.items():
            if not count:
                log.warning("no calibration token reaches %s", name)
        seen: list[Unit] = []
        names = {self.settings.quantizer, self.settings.proxy_quantizer} - {None}
        if fed := sorted(n for n in names if n and needs_second_moments(load_quantizer(n))):
            seen = [unit for unit in units if reached.get(unit.name)]
            _warn_if_few(calibration.tokens.numel(), units, fed[0])
        room = available_bytes(decoder.device) // 4
        moments = second_moments_in_turn(decoder, seen, calibration.tokens, room)
        atomic_write(path, statistics_parts(calibration.sha256, means, seen, moments))

    @cached_property
    def statistics_sha256(self) -> str:
        """Hash of the input statistics."""
        _ = self.importance
        return file_sha256(self.run.path / STATISTICS)

    @cached_property
    def weights(self) -> CandidateWeights:
        """The model's weights under any assignment."""
        return self._weights(self.settings.quantizer)

    @cached_property
    def damage_weights(self) -> CandidateWeights:
        """The weights that damage is measured with: the same, unless a proxy is asked for."""
        proxy = self.settings.proxy_quantizer
        return self.weights if proxy is None else self._weights(proxy)

    def _weights(self, name: str) -> CandidateWeights:
        from bitsearch.objectives.memory import available_bytes
        from bitsearch.objectives.statistics_file import StoredMoments
        from bitsearch.objectives.weights import CandidateWeights

        quantizer, importance = load_quantizer(name), self.importance
        return CandidateWeights(
            self.decoder.model,
            quantizer,
            importance,
            available_bytes(self.decoder.device) // 3,
            StoredMoments(self.run.path / STATISTICS, self.device)
            if needs_second_moments(quantizer)
            else None,
            open_external(
                self.settings.external,
                self._opened.model,
                self._opened.model,
                self.device,
            ),
        )

    def scoring(self, weights: CandidateWeights) -> Scoring:
        """What an estimator is given."""
        from bitsearch.objectives.damage.scoring import Scoring

        return Scoring(
            self.decoder,
            self.space.units,
            self.space.candidates,
            weights,
            self.corpora["calibration"].tokens,
            self.settings.seed,
        )

    def table_signature(self, estimator: str) -> dict[str, Any]:
        """What a damage table's meaning depends on."""
        settings = self.settings
        return {
            "estimator": estimator,
            "model": self.fingerprint,
            "calibration": self.corpora["calibration"].describe(),
            "quantizer": settings.quantizer,
            "dtype": settings.dtype,
            "seed": settings.seed,
            **({"preparation": made} if (made := self.preparation_sha256) else {}),
            **({"proxy_quantizer": proxy} if (proxy := settings.proxy_quantizer) else {}),
            **({"external": plain(settings)["external"]} if settings.external else {}),
        }


def _warn_if_few(tokens: int, units: Sequence[Unit], quantizer: str) -> None:
    """Fewer tokens than columns leave directions of the inputs unseen."""
    columns = max(matrix.in_features for unit in units for matrix in unit.matrices)
    if tokens < columns:
        log.warning(
            "%s fits its weights to %d calibration tokens, fewer than the %d inputs of a layer, "
            "and may do worse than rtn on other text; give more with --windows",
            quantizer,
            tokens,
            columns,
        )


def embedding_rows(model: Any) -> int:
    """Token ids below this have an embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def pick_device(name: str) -> str:
    """`auto` -> the GPU if there is one.

    Raises:
        UsageError: it is no device.
        BadInput: a GPU is asked for that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise UsageError(f"unknown device '{name}': give auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"device '{name}' is not available: {torch.cuda.device_count()} CUDA GPUs are "
            "visible; use --device cpu"
        )
    return name


@contextmanager
def open_session(
    model: str, out: Path | None, device: str, given: Mapping[str, Any]
) -> Iterator[Session]:
    """The session of a model, or of a run directory given in its place.

    Args:
        model: model reference, or the path of an existing run.
        out: run directory; `runs/NAME` by default.
        device: `auto`, `cpu`, `cuda` …
        given: settings that the user gave; None where they did not.

    Raises:
        SettingsMismatch: an existing run was made with other settings.
    """
    resumed = (Path(model) / "space.json").is_file()
    if resumed and out is not None and out.resolve() != Path(model).resolve():
        raise UsageError(f"{model} is a run itself; leave --out away, or give the model's name")
    path = Path(model) if resumed else out or Path("runs") / Path(model).name.replace("@", "-")
    given = {name: value for name, value in given.items() if value is not None}
    if "windows" in given:
        given["windows"] = parse_windows(given["windows"])
    if "candidates" in given:
        given["candidates"] = tuple(f.name for f in parse_formats(given["candidates"]))
    if "external" in given:
        given["external"] = described(given["external"])
    if "texts" in given:
        given["texts"] = tuple(given["texts"])
    if resumed:
        with Run(path) as run:
            yield Session(run, replace(stored_settings(run.path), **given), pick_device(device))
        return
    settings = replace(default_settings(model, given), **given)
    with Run(path) as run:
        yield Session(run, settings, pick_device(device))
