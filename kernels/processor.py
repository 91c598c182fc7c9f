"""The processor that this runs on: its name, cores, caches, clocks and energy counter."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path

import psutil

_LEAST_CACHE = 32 * 2**20  # where the system does not tell
_POWERCAP = Path("/sys/class/powercap")


@cache
def processor() -> dict[str, str]:
    """Name, cores and instruction sets; equal on equal machines."""
    name: str = platform.processor()
    flags = ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        name = _sysctl("machdep.cpu.brand_string") or name
    else:
        fields: dict[str, str] = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
        name = fields.get("model name", name)
        family = [fields[part] for part in ("cpu family", "model", "stepping") if part in fields]
        name += f" ({'/'.join(family)})" if family else ""
        flags = fields.get("flags", fields.get("Features", ""))
    return {
        "name": name or platform.machine(),
        "cores": f"{os.cpu_count()} cores",
        "features": hashlib.sha256(flags.encode()).hexdigest()[:12],
    }


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache that a core sees; 32 MiB where it is not told."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"([0-9]+)([KMG])", path.read_text(encoding="utf-8").strip()):
            sizes.append(int(match[1]) * 1024 ** ("KMG".index(match[2]) + 1))
    for key in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):
        if max(sizes) == 0 and (found := _sysctl(key)):
            sizes.append(int(found))
    return max(sizes) or _LEAST_CACHE


def clock(threads: int) -> str:
    """`thread` for one thread, whose processor time leaves out what others took; else `wall`."""
    return "thread" if threads == 1 else "wall"


def now(clock: str) -> int:
    """Nanoseconds on a clock."""
    return time.thread_time_ns() if clock == "thread" else time.perf_counter_ns()


def energy_counter() -> Path | None:
    """The processor's energy counter in microjoules, if there is one that can be read."""
    for path in sorted(_POWERCAP.glob("intel-rapl:?/energy_uj")):
        if os.access(path, os.R_OK):
            return path
    return None


def load() -> float:
    """Processes that ran or waited over the last minute, for each core."""
    return psutil.getloadavg()[0] / (os.cpu_count() or 1)


def _sysctl(key: str) -> str:
    """A value of macOS; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return found.stdout.strip()
