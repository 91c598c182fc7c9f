"""Every barrier, wait, mask and tail check is missed when it is gone.

Each is taken out of the source by itself; the program is built anew, barriers and waits with the
thread sanitizer, the others with the address sanitizer, and the cases must go wrong.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitsearch.kernels.emulation import Emulator
from bitsearch.kernels.nvrtc import SOURCES

pytestmark = pytest.mark.slow

KERNELS = ("batch.cuh", "dequantize.cuh", "stream.cuh", "tokens.cuh")
BARRIER = re.compile(r"sync_block\(\);|sync_warp\(\);|copy_wait<[^>]*>\(\);")
# (file, what is checked, what stands there instead); each occurs once.
MASKS = [
    ("stream.cuh", "inside = start + column < args.columns;", "inside = true;"),
    ("stream.cuh", "if (start + column + k < args.columns)", "if (true)"),
    ("stream.cuh", "c * 8 + g < args.m ? c * 8 + g : args.m - 1", "c * 8 + g"),
    ("stream.cuh", "if (column < args.m) f", "f"),
    ("stream.cuh", "if (inside >= segment.rows) return;", ""),
    ("stream.cuh", "if (part(w, all) <= start && part(w + 1, all) >= stop) continue;", ""),
    ("stream.cuh", "part(w, all) > start ? heads + w * head_bytes() :", ""),
    ("stream.cuh", "(shared<u32>(seen + 4 * index) != last)", "(shared<u32>(seen + 4 * index))"),
    ("stream.cuh", "s + k < args.splits ? load_through", "true ? load_through"),
    ("stream.cuh", "if (before == last) *arrived = 0;", ""),
    ("stream.cuh", "if (ahead.left) {", "{"),
    ("batch.cuh", "int(number) + b < last ? int(number) + b : last", "int(number) + b"),
    ("batch.cuh", "column + row < args.m ? column + row : args.m - 1", "column + row"),
    ("batch.cuh", "(inside ? at : 0), inside)", "at, true)"),
    ("batch.cuh", "if (tile >= count) return;", ""),
    ("batch.cuh", "if (inside >= segment.rows || at >= args.m) continue;", ""),
    ("batch.cuh", "if (!found) idle();", ""),
    ("batch.cuh", "if (shared<u32>(base) != u32(last)) return;", "if (shared<u32>(base)) return;"),
    ("batch.cuh", "if (before == u32(last)) args.arrived[tile] = 0;", ""),
    ("dequantize.cuh", "if (inside < segment.rows) store", "store"),
    ("dequantize.cuh", "if (column < args.columns)\n", "if (true)\n"),
    ("dequantize.cuh", "if (column + k < args.columns)", "if (true)"),
    ("tokens.cuh", "i < args.columns ? to_float", "true ? to_float"),
    ("tokens.cuh", "if (thread_index() < half)", "if (true)"),
]  # fmt: skip
# Nothing is under way there any more: they stand for the reader, and no case can miss them.
IDLE = {("batch.cuh", "copy_wait<0>();")}


def _barriers() -> list[tuple[str, int]]:
    """Every barrier and wait: its file and where it begins."""
    return [
        (name, match.start())
        for name in KERNELS
        for match in BARRIER.finditer((SOURCES / name).read_text(encoding="utf-8"))
        if (name, match[0]) not in IDLE
    ]


def test_barriers_are_found() -> None:
    assert len(_barriers()) >= 14


@pytest.mark.parametrize(("name", "start"), _barriers())
def test_a_missing_barrier_is_noticed(
    build_emulator: Callable[..., Emulator],
    wrong: Callable[[Emulator], str],
    tmp_path: Path,
    name: str,
    start: int,
) -> None:
    text = (SOURCES / name).read_text(encoding="utf-8")
    found = BARRIER.match(text, start)
    assert found
    source = _copy(tmp_path, name, text[:start] + text[found.end() :])
    assert wrong(build_emulator("-O1", "-DFEW_KINDS", "-fsanitize=thread", source=source))


@pytest.mark.parametrize(("name", "check", "instead"), MASKS)
def test_a_missing_check_is_noticed(
    build_emulator: Callable[..., Emulator],
    wrong: Callable[[Emulator], str],
    tmp_path: Path,
    name: str,
    check: str,
    instead: str,
) -> None:
    text = (SOURCES / name).read_text(encoding="utf-8")
    assert text.count(check) == 1, "name the check so that it is one"
    source = _copy(tmp_path, name, text.replace(check, instead))
    assert wrong(build_emulator("-O1", "-DFEW_KINDS", "-fsanitize=address", source=source))


def _copy(folder: Path, name: str, text: str) -> Path:
    source = folder / "cuda"
    shutil.copytree(SOURCES, source)
    (source / name).write_text(text, encoding="utf-8")
    return source
