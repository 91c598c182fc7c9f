"""A latency table for hardware that is not here, estimated from a few of its numbers.

    launch(m, n, k)  = t0 + max(bytes / bandwidth, 2 m n k / peak)
    rest(m, context) = 8 · blocks · t0 + KV bytes / bandwidth

the roofline (Williams, Waterman, Patterson, CACM 52, 2009) with a fixed cost per launch.
Bytes are those of the format, with 16-bit inputs and outputs. It knows nothing of how fast
a kernel unpacks its format, and so no format is ever slower than one of more bytes: on a
processor that is often wrong. The eight small launches of a block are its norms, rotary
embeddings, attention and residuals. Tables made so say `estimated` throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitsearch.formats import Format
from bitsearch.kernels.devices import Launch, NoKernel
from bitsearch.kernels.profile_file import Cell
from bitsearch.kernels.regime import Regime, launch_of
from bitsearch.objectives.cost.rest import kv_bytes
from bitsearch.units import ModelLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NUMBERS = ("launch_us", "read_gbps", "gflops")
_SMALL_LAUNCHES = 8  # of a block, beside its multiplications


def estimated_cells(
    numbers: dict[str, float],
    layout: ModelLayout,
    config: PreTrainedConfig,
    formats: Sequence[Format],
    regimes: Sequence[Regime],
) -> list[Cell]:
    """The cells of a model's launches and steps.

    Args:
        numbers: `launch_us`, `read_gbps` and `gflops` of the device.
        layout: of the model.
        config: of the model.
        formats: that the device is taken to run.
        regimes: of the steps.

    Raises:
        NoKernel: the model has experts.
    """
    launches: dict[Launch, int] = {}
    for regime in regimes:
        for unit in layout.units:
            for format in formats:
                if all(format.fits(m.in_features) for m in unit.matrices):
                    launch = launch_of(unit, format.name, regime)
                    weights = format.bytes(launch.n, launch.k)
                    launches[launch] = weights + 2 * launch.m * (launch.n + launch.k)
    cells = [_launch(launch, size, numbers) for launch, size in launches.items()]
    for regime in regimes:
        size = kv_bytes(config, regime)
        time = _SMALL_LAUNCHES * len(layout.blocks) * numbers["launch_us"]
        cells.append(_cell(
            time + size / numbers["read_gbps"] / 1e3, op="rest", m=regime.rows, k=0, segments=[],
            context=regime.context, phase=regime.phase, bytes=size, fixed=0.0,
        ))  # fmt: skip
    return cells


def _launch(launch: Launch, size: int, numbers: dict[str, float]) -> Cell:
    reading = size / numbers["read_gbps"] / 1e3
    computing = 2 * launch.m * launch.n * launch.k / numbers["gflops"] / 1e3
    time = numbers["launch_us"] + max(reading, computing)
    return _cell(
        time, op="linear", m=launch.m, k=launch.k, segments=list(launch.segments), bytes=size,
        fixed=numbers["launch_us"] / time,
    )  # fmt: skip


def _cell(time: float, **fields: object) -> Cell:
    return Cell.model_validate(
        {
            "kernel": "roofline",
            "activations": "",
            "median_us": time,
            "p25_us": time,
            "p75_us": time,
            "min_us": time,
            "n": 0,
            "error": 0.0,
            "status": "estimated",
            **fields,
        }
    )


__all__ = ["NUMBERS", "NoKernel", "estimated_cells"]
