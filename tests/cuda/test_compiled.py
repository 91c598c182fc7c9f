"""What the compiler makes of the kernels for six targets: no spills, few instructions a weight.

NVRTC compiles; triton's wheel brings the disassembler. Neither needs a GPU.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bitsearch.errors import BadInput
from bitsearch.kernels import calibrate, entries, launches
from bitsearch.kernels.nvrtc import compile_kernel
from bitsearch.kernels.partition import partition
from bitsearch.kernels.planes import Shape

pytestmark = pytest.mark.slow

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
# Lane instructions a weight that an H100 can issue while it reads one at 0.85 of its copy
# bandwidth: 132 · 128 · 1.98 GHz · (bits + 0.125) / (8 · 0.85 · 3.0 TB/s); of 1 bit half of 2.
BUDGET = {1: 1.85, 2: 3.5, 3: 5.1, 4: 6.8, 5: 8.4, 6: 10.0, 7: 11.7, 8: 13.3}
WEIGHTS = 64  # of a lane in a tile


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The disassembler of triton's wheel."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("needs triton's cuobjdump: make test-kernels installs it")
    return str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def code_of(entry: str, target: str, folder: Path) -> Path:
    """Machine code in a file."""
    try:
        code = compile_kernel(entry, target)
    except BadInput as error:
        pytest.skip(f"{error}: make test-kernels installs it")
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    return path


def stream(dtype: torch.dtype, m: int, kinds: list[entries.Kind]) -> str:
    """The streaming kernel as it is launched for segments of these kinds."""
    shapes = tuple(
        Shape(bits, 128 // groups if groups else 0, not zeros, 16, 128)
        for bits, groups, zeros in kinds
    )
    return entries.stream(dtype, m, kinds, launches.tuning_of(shapes, m))


def every_entry() -> dict[str, str]:
    """One entry point of each kernel, type and number of columns, of several kinds."""
    kinds = [(2, 4, True), (3, 1, False), (4, 2, True), (5, 0, True), (7, 1, True), (8, 1, False)]
    found = {"calibrate": calibrate.ENTRY}
    for dtype in entries.TYPES:
        name = str(dtype).removeprefix("torch.")
        found[f"tokens {name}"] = entries.tokens(dtype)
        found[f"dequantize {name}"] = entries.dequantize(dtype, kinds)
        for m in (1, 16):
            found[f"mixed {name} {m}"] = stream(dtype, m, kinds)
            few = [(2, 2, True), (4, 2, True), (8, 2, True)]
            three = [(2, 1, False), (5, 1, False), (8, 1, False)]
            found[f"three {name} {m}"] = stream(dtype, m, three)
            found[f"asymmetric {name} {m}"] = stream(dtype, m, few)
            found[f"stream {name} {m}"] = stream(dtype, m, kinds[1:2])
        for kind in ((2, 2, False), (4, 1, True), (7, 4, True)):
            for cols in (4, 8) if kind[1] == 1 else (4,):
                label = f"{name} {cols} {kind}"
                found[f"batch {label}"] = entries.batch(dtype, cols, [kind])
                found[f"bytes {label}"] = entries.batch(dtype, cols, [kind], integers=True)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(cuobjdump: str, tmp_path: Path, target: str) -> None:
    for name, entry in every_entry().items():
        path = code_of(entry, target, tmp_path)
        usage = subprocess.run(
            [cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        functions = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert functions, name
        for registers, stack, _, local in functions:
            assert int(stack) == int(local) == 0, (name, target)
            assert int(registers) <= 255


@pytest.mark.parametrize("dtype", list(entries.TYPES))
@pytest.mark.parametrize("bits", range(1, 9))
def test_instructions_a_weight(
    cuobjdump: str, tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    entry = stream(dtype, 1, [(bits, 1, False)])
    path = code_of(entry, "sm_90a", tmp_path)
    text = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True)
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text.stdout)
    listing = [(int(at, 16), instruction) for at, instruction in lines]
    body = _loop(listing)
    # Of these, those that open the next item run once an item, not once a tile.
    assert len(body) / WEIGHTS < max(BUDGET[bits], 3.1), len(body)
    assert sum("HMMA" in line for line in body) == 8
    copies = [line for line in body if "LDGSTS" in line]
    assert sum(".128" in line for line in copies) == bits // 2
    assert not any(re.match(r"(LDL|STL)", line) for _, line in listing)
    # Items are read by their address. CUDA 13.0's assembler has read one two places on instead.
    assert not any(re.match(r"LDS R\d+, \[U?R\d+\+0x1[48c]\]", line) for _, line in listing)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_block_of_few_rows_has_a_multiprocessor_to_itself(
    cuobjdump: str, tmp_path: Path, bits: int
) -> None:
    shapes = (Shape(bits, 128, True, 6144, 640),)
    how = launches.tuning_of(shapes, 1)
    path = code_of(entries.stream(torch.bfloat16, 1, [(bits, 1, False)], how), "sm_90a", tmp_path)
    usage = subprocess.run(
        [cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    registers = max(int(found) for found in re.findall(r"REG:(\d+) STACK", usage))
    shared = partition(shapes, 1, 132, 228 << 10, how).shared_bytes
    fit = min(65536 // (registers * 32 * how.warps), (228 << 10) // (shared + 1024))
    assert fit == 1, (registers, shared)


def _loop(listing: list[tuple[int, str]]) -> list[str]:
    """The shortest loop that multiplies: what is between a branch back and its target."""
    loops = []
    for at, instruction in listing:
        target = re.search(r"BRA.*?(0x[0-9a-f]+)", instruction)
        if target and (start := int(target[1], 16)) < at:
            body = [line for place, line in listing if start <= place <= at]
            if any("HMMA" in line for line in body):
                loops.append(body)
    return min(loops, key=len)
