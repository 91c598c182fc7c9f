"""Hardware counters of the streaming kernel, by Nsight Compute: what each launch waits for.

Launches are alone and their caches empty, so durations are longer than in a graph.
"""

from __future__ import annotations

import csv
import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

SECTIONS = (
    "SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats",
    "InstructionStats", "MemoryWorkloadAnalysis",
)  # fmt: skip
KEPT = (
    "Duration", "Registers Per Thread", "Achieved Occupancy", "Theoretical Occupancy",
    "Executed Ipc Active", "Issue Slots Busy", "No Eligible", "Eligible Warps Per Scheduler",
    "DRAM Throughput", "Memory Throughput", "Max Bandwidth", "L2 Hit Rate",
    "Executed Instructions", "SM Frequency", "Dynamic Shared Memory Per Block",
)  # fmt: skip
CASES = list(itertools.product(("gate_up", "down", "o"), (2, 3, 4), (1, 16)))


def counters(result: dict[str, Any]) -> None:
    """One launch of each case under the profiler."""
    command = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", "entry"]
    for section in SECTIONS:
        command += ["--section", section]
    text = subprocess.run(
        [*command, sys.executable, __file__], capture_output=True, text=True, check=False
    ).stdout
    start = text.find('"ID"')
    if start < 0:
        raise RuntimeError(text[-500:])
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        if row["Metric Name"] in KEPT:
            name = f"{row['Metric Name']} [{row['Metric Unit']}]"
            found.setdefault(row["ID"], {})[name] = row["Metric Value"]
    for (shape, bits, m), values in zip(CASES, found.values(), strict=False):
        result["rows"].append({"shape": shape, "bits": bits, "m": m, **values})
        print(shape, bits, m, values, flush=True)


def main() -> None:
    """Launch every case once, after nothing else of ours."""
    import torch
    from speed import SHAPES
    from weights import random_fused, random_input

    from bitsearch.kernels.operators import matmul

    for shape, bits, m in CASES:
        rows, columns = SHAPES[shape]
        weight = random_fused([(rows, bits, 128, True)], columns, bits)
        matmul(random_input(m, columns, torch.bfloat16), weight)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
