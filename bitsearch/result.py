"""What a search found, as `search --json` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitsearch.budget import Budget
from bitsearch.contenders import Contender
from bitsearch.evaluate import Quality, interval, summary
from bitsearch.judge import Judge
from bitsearch.policy import Policy
from bitsearch.space import Space
from bitsearch.timed import Timing


@dataclass(frozen=True, slots=True)
class Judged:
    """A contender and its quality on one text."""

    contender: Contender
    quality: Quality


def make_result(
    space: Space,
    budgets: Sequence[Budget],
    timing: Timing | None,
    policy: Policy,
    judge: Judge,
    shipped: Judged,
    controls: Sequence[Judged],
    selection: Sequence[Judged],
) -> dict[str, Any]:
    """Bytes, times, quality on held-out text, controls, and the figures of the selection.

    Args:
        judge: of held-out text, that `shipped` and `controls` were measured on.
        selection: all contenders, on selection text.
    """
    size = space.total_bytes(shipped.contender.choice)
    return {
        "target": space.target.name,
        "bytes": size,
        "bpw": 8 * size / space.layout.parameters,
        "limit_bytes": [budget.limit for budget in budgets if budget.regime is None],
        "latency": [entry.model_dump() for entry in policy.latency or []],
        "shipped": shipped.contender.name,
        **summary(shipped.quality, judge.reference_nll, judge.corpus),
        "controls": [
            _control(control, shipped.quality, space) | _times(timing, control.contender)
            for control in controls
        ],
        "selection": [
            {
                "name": one.contender.name,
                "bytes": space.total_bytes(one.contender.choice),
                "kl": one.quality.mean_kl,
            }
            | _times(timing, one.contender)
            for one in selection
        ],
    }


def _control(control: Judged, shipped: Quality, space: Space) -> dict[str, Any]:
    """A control's figures, and by how much the shipped policy beats it, paired."""
    size = space.total_bytes(control.contender.choice)
    difference = shipped.kl - control.quality.kl
    return {
        "name": control.contender.name,
        "bytes": size,
        "bpw": 8 * size / space.layout.parameters,
        "kl": control.quality.mean_kl,
        "kl_ci": interval(control.quality.kl),
        "perplexity": control.quality.perplexity,
        "difference": float(difference.mean()),
        "difference_ci": interval(difference),
    }


def _times(timing: Timing | None, contender: Contender) -> dict[str, Any]:
    """Milliseconds of a step in each regime; nothing where no time is asked for."""
    if timing is None:
        return {}
    entries = timing.describe(contender.choice)
    return {"ms": {entry.regime: entry.measured_ms or entry.predicted_ms for entry in entries}}
