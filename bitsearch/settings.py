"""The settings that give a run's numbers their meaning, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitsearch.corpora import PURPOSES
from bitsearch.errors import BadInput, UsageError
from bitsearch.formats import parse_formats
from bitsearch.run import read_json

SCHEMA = "bitsearch.space/1"
DEFAULT_CANDIDATES = "int{2,3,4,5,6,8}-g64,int{2,3,4,5,6,8}-g128,bf16"
DEFAULT_TEXTS = ("wiki", "c4")
DEFAULT_WINDOWS = "16,16,32"
DEFAULT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class ExternalFiles:
    """A checkpoint of another tool, whose weights are a candidate.

    Attributes:
        path: folder or GGUF file, as the user gave it.
        sha256: of each of its weight files, by name.
    """

    path: str
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that gives a run's numbers their meaning.

    Attributes:
        model: reference as the user gave it.
        revision: hub revision.
        fuse: one unit of what engines fuse (q/k/v, gate/up).
        candidates: format names.
        frozen: format name by unit pattern.
        texts: texts that are cut into calibration, selection and evaluation parts.
        own_texts: text used whole for one purpose.
        length: tokens a window.
        windows: number of windows by purpose.
        quantizer: name of the quantizer.
        dtype: dtype that the model runs in.
        seed: of everything random.
        target: the engine that policies are for.
        prepare: name of the preparation of the model, if there is one.
        proxy_quantizer: name of another quantizer that damage is measured with, if asked for.
        external: where the weights of formats come from another tool, by format name.
    """

    model: str
    revision: str | None
    fuse: bool
    candidates: tuple[str, ...]
    frozen: dict[str, str]
    texts: tuple[str, ...]
    own_texts: dict[str, str]
    length: int
    windows: dict[str, int]
    quantizer: str
    dtype: str
    seed: int
    target: str
    prepare: str | None = None
    proxy_quantizer: str | None = None
    external: dict[str, ExternalFiles] = field(default_factory=dict)


def stored_settings(folder: Path) -> Settings:
    """The settings that a run was made with.

    Raises:
        BadInput: it is no run, or its `space.json` is damaged.
    """
    from pydantic import TypeAdapter, ValidationError

    path = folder / "space.json"
    content = read_json(path)
    try:
        if content["schema"] != SCHEMA:
            raise BadInput(f"{path} has schema {content['schema']!r}")
        values = dict(content["settings"])
        values["candidates"] = tuple(values["candidates"])
        values["texts"] = tuple(values["texts"])
        values.setdefault("target", "none")  # older runs
        found: Settings = TypeAdapter(Settings).validate_python(asdict(Settings(**values)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{path}: {where}: {first['msg']}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a run of bitsearch: {error}") from error
    if set(found.windows) != set(PURPOSES) or min(found.windows.values()) < 1 or found.length < 2:
        raise BadInput(f"{path} holds no usable windows")
    return found


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON values; as in older runs, nothing is said of what was not asked for."""
    values = asdict(settings)
    if settings.target == "none":
        del values["target"]
    if not settings.external:
        del values["external"]
    values["candidates"], values["texts"] = list(settings.candidates), list(settings.texts)
    return values


def default_settings(model: str, given: Mapping[str, Any]) -> Settings:
    """What is used for everything that the user did not give."""
    from bitsearch.targets import DEFAULT_TARGET, load_target

    target = given.get("target", DEFAULT_TARGET)
    candidates = load_target(target).candidates or DEFAULT_CANDIDATES
    shipped = model == "tiny"
    own = {purpose: purpose for purpose in PURPOSES} if shipped else {}
    if "texts" in given:
        own = {}
    return Settings(
        model=model,
        revision=None,
        fuse=True,
        candidates=tuple(f.name for f in parse_formats(candidates)),
        frozen={},
        texts=() if shipped else DEFAULT_TEXTS,
        own_texts=own,
        length=DEFAULT_LENGTH,
        windows=parse_windows(DEFAULT_WINDOWS),
        quantizer="rtn",
        dtype="float32",
        seed=0,
        target=target,
    )


def refuse_unfused(target: str, fuse: bool) -> None:
    """A target that fuses matrices cannot run them in several formats.

    Raises:
        UsageError: `fuse` is off for such a target, or there is no such target.
    """
    from bitsearch.targets import load_target

    if not fuse and load_target(target).fuse:
        raise UsageError(f"{target} fuses q/k/v and gate/up: leave --no-fuse away")


def parse_windows(text: str) -> dict[str, int]:
    """`16,16,32` -> windows by purpose.

    Raises:
        UsageError: not three positive numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != len(PURPOSES) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--windows {text}: write three numbers, such as {DEFAULT_WINDOWS}")
    return {purpose: int(part) for purpose, part in zip(PURPOSES, parts, strict=True)}
