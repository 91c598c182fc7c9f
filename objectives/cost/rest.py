"""What a step takes beyond its launches, measured on whole models.

    rest = median(step − stack)

over a model in its narrowest formats and one in its widest, with the step and the stack
of its launches timed in turn, so that what the launches do to the caches is in it. No
time of a single launch takes part; what lone launches miss is told by `in_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bitsearch.errors import BadInput
from bitsearch.formats import Format
from bitsearch.kernels.devices import Device, NoKernel
from bitsearch.kernels.profile_file import Cell
from bitsearch.kernels.profiler import quartiles
from bitsearch.kernels.regime import Regime, launch_of
from bitsearch.objectives.cost.assemble import assemble, runtime
from bitsearch.units import ModelLayout, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAMPLES = 9
_WARM = 2


def runnable(
    device: Device, layout: ModelLayout, formats: Sequence[Format], regime: Regime
) -> dict[str, list[Format]]:
    """The formats that the device runs of each unit, by its name, narrowest first.

    Raises:
        BadInput: a unit has none.
    """
    found: dict[str, list[Format]] = {}
    for unit in layout.units:
        runs, refused = [], ""
        for format in formats:
            try:
                device.kernel(launch_of(unit, format.name, regime))
                runs.append(format)
            except NoKernel as error:
                refused = refused or str(error)
        if not runs:
            raise BadInput(
                f"device {device.name} runs none of these formats for {unit.name} ({refused}); "
                "name others with --candidates, such as bf16"
            )
        found[unit.name] = sorted(runs, key=lambda format: _bytes(unit, format))
    return found


def rest_cell(
    device: Device,
    layout: ModelLayout,
    config: PreTrainedConfig,
    formats: Sequence[Format],
    regime: Regime,
) -> Cell:
    """The `rest` cell of a regime.

    Args:
        device: what runs the model.
        layout: of the model.
        config: of the model.
        formats: to choose from.
        regime: of the step.

    Raises:
        BadInput: a unit has no format with a kernel, or the model no such regime.
    """
    runs = runnable(device, layout, formats, regime)
    seen: list[float] = []
    for end in (0, -1):
        choice = [(unit, runs[unit.name][end]) for unit in layout.units]
        model = assemble(device, layout, config, choice, regime)
        try:
            for _ in range(_WARM):
                model.step.sample()
                model.stack.sample()
            for _ in range(SAMPLES):
                step = model.step.sample()[0]
                seen.append(max(0.0, step - model.stack.sample()[0]))
        finally:
            model.close()
    least, low, median, high = (value / 1e3 for value in quartiles(seen))
    return Cell(
        op="rest",
        m=regime.rows,
        k=0,
        segments=[],
        context=regime.context,
        phase=regime.phase,
        kernel=runtime(device, layout, config),
        activations=device.dtype,
        median_us=median,
        p25_us=low,
        p75_us=high,
        min_us=least,
        n=len(seen),
        bytes=kv_bytes(config, regime),
        fixed=0,
        error=0,
        status="ok" if high - low <= device.stability.spread * median else "unstable",
    )


def kv_bytes(config: PreTrainedConfig, regime: Regime) -> int:
    """Bytes of keys and values in 16 bits that a step reads."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or regime.context
    seen = sum(
        min(regime.context, window) if kind == "sliding_attention" else regime.context
        for kind in kinds
    )
    return int(2 * 2 * heads * width * seen * regime.batch)


def _bytes(unit: Unit, format: Format) -> int:
    return sum(m.count * format.bytes(m.out_features, m.in_features) for m in unit.matrices)
