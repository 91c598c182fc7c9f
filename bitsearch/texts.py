"""Texts that can be named without a path: shipped with bitsearch, or fetched once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import bitsearch
from bitsearch.errors import BadInput
from bitsearch.models.packages import cache_folder, cached, fetch, verify

_SHIPPED = Path(bitsearch.__file__).parent / "builtin" / "text"
_PACKAGE = "exllamav3==1.6.5"
_MEMBERS = "exllamav3/conversion/standard_cal_data/*.utf8"

# File and SHA-256 of each text in the package.
_FETCHED = {
    "wiki": ("wiki.utf8", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    "c4": ("c4.utf8", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "code": ("code.utf8", "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891"),
    "technical": (
        "technical.utf8",
        "7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee",
    ),
    "stories": ("tiny.utf8", "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd"),
}

# The wiki text keeps one pair of these lines around each article.
_ARTICLE_MARK = re.compile(r"^(?:<doc [^\n]*>|</doc>)\n", re.MULTILINE)

TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "wiki": "English Wikipedia articles, 2.1 MB, CC BY-SA",
        "c4": "web pages from C4, 1.3 MB, ODC-BY",
        "code": "source code in many languages, 1.4 MB",
        "technical": "technical writing, 0.35 MB",
        "stories": "TinyStories, 0.26 MB",
    }
    | {file.stem: "shipped with bitsearch" for file in sorted(_SHIPPED.glob("*.txt"))}
)
"""Names that `builtin_text` takes, with one line about each."""


def builtin_text(name: str) -> str:
    """A built-in text; the first call for a fetched one downloads all of them.

    Args:
        name: one of `TEXTS`.

    Raises:
        BadInput: no such text, or it cannot be downloaded.
    """
    if (shipped := _SHIPPED / f"{name}.txt").is_file() and name in TEXTS:
        return shipped.read_text(encoding="utf-8")
    if name not in _FETCHED:
        raise BadInput(f"no built-in text '{name}'; there are: {', '.join(TEXTS)}")
    folder = cached(cache_folder() / "texts" / _PACKAGE, _fetch_all)
    file, sha256 = _FETCHED[name]
    verify(folder / file, sha256)
    text = (folder / file).read_text(encoding="utf-8")
    return _ARTICLE_MARK.sub("", text) if name == "wiki" else text


def _fetch_all(folder: Path) -> None:
    """Download every text of the package."""
    fetch(_PACKAGE, _MEMBERS, folder)
