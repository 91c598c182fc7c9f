"""Measure the CUDA kernels on the GPU of this machine, step by step.

    python experiments/gpu/run.py OUT STEP[:SECONDS] ...

Each step writes OUT/STEP.json as soon as it ends; a step that fails or takes longer than its
seconds writes what it has and why, and the next one runs.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bitsearch.kernels import launches
from bitsearch.kernels.nvrtc import source_hash

STEPS = {
    "compile": "speed",
    "calibration": "correct",
    "correctness": "correct",
    "conformance": "correct",
    "sanitizer": "correct",
    "tuning": "stack",
    "kinds": "speed",
    "counters": "counters",
    "grid": "speed",
    "segments": "stack",
    "stack": "stack",
    "profile_gemma": "tables",
    "profile_llama": "tables",
    "search": "tables",
    "search_llama": "tables",
    "peers": "peers",
}
_QUERY = (
    "name,uuid,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,"
    "temperature.gpu"
)


class OutOfTime(BaseException):
    """A step took longer than it was given."""


def device() -> dict[str, Any]:
    """What the GPU says of itself now."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = dict(zip(_QUERY.split(","), values.strip().split(", "), strict=True))
    found["uuid"] = found["uuid"][-8:]
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(0)),
    }


def main(out: Path, steps: list[str]) -> None:
    """Run the steps, each by itself."""
    out.mkdir(parents=True, exist_ok=True)

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    for text in steps:
        name, _, seconds = text.partition(":")
        result: dict[str, Any] = {
            "step": name,
            "source": source_hash(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "before": device(),
            "rows": [],
        }
        start = time.perf_counter()
        signal.alarm(int(seconds or 300))
        try:
            getattr(importlib.import_module(STEPS[name]), name)(result)
        except (Exception, OutOfTime) as error:
            result["failed"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            signal.alarm(0)
        result["seconds"] = round(time.perf_counter() - start, 1)
        result["after"] = device()
        result["tuned"] = {
            f"{units},{bits}": [how.warps, how.stages, how.resident]
            for (units, bits), how in launches.TUNED.items()
        }
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"== {name}: {result['seconds']} s, {result.get('failed', 'done')}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), sys.argv[2:])
