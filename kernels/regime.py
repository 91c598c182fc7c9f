"""Regimes that a model runs in, and the launches of a unit in each.

batch=1               decode: one new token for each of so many sequences, with the
batch=16,context=1024 default number of tokens in the cache, or with so many
prefill=512           one sequence of so many tokens into an empty cache
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bitsearch.errors import UsageError
from bitsearch.kernels.devices import Launch, NoKernel
from bitsearch.units import Unit

CONTEXT = 256
_REGIME = re.compile(
    r"batch=(?P<batch>[1-9][0-9]{0,4})(?:,context=(?P<context>[1-9][0-9]{0,6}))?"
    r"|prefill=(?P<prefill>[1-9][0-9]{0,5})"
)


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to run a model.

    Attributes:
        phase: `decode` or `prefill`.
        batch: sequences that run together; 1 in prefill.
        context: tokens in the KV cache once the step is done, the new ones included.
    """

    phase: Literal["decode", "prefill"]
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """New tokens of each sequence."""
        return 1 if self.phase == "decode" else self.context

    @property
    def rows(self) -> int:
        """New tokens of all sequences: the rows of every multiplication but the head's."""
        return self.batch * self.tokens

    @property
    def text(self) -> str:
        """As it is written."""
        if self.phase == "prefill":
            return f"prefill={self.context}"
        return f"batch={self.batch},context={self.context}"


def parse_regime(text: str) -> Regime:
    """Read a regime.

    Raises:
        UsageError: the text is none.
    """
    match = _REGIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"'{text}' is no regime; write batch=1, batch=16,context=1024 or prefill=512"
        )
    if match["prefill"]:
        return Regime("prefill", 1, int(match["prefill"]))
    return Regime("decode", int(match["batch"]), int(match["context"] or CONTEXT))


def launch_of(unit: Unit, format: str, regime: Regime) -> Launch:
    """The launch that a step makes for a unit; an embedding's is that of a head of its shape.

    An embedding that is not the head as well is only looked up, which takes no launch, but
    its format must be one that the device knows: there must be a kernel for this one.

    Args:
        unit: of the model.
        format: name of the format it is in.
        regime: of the step; only each sequence's last token goes through the head.

    Raises:
        NoKernel: experts, whose launches depend on the tokens.
    """
    if unit.kind == "experts":
        raise NoKernel("mixtures of experts have no kernels here")
    rows = regime.batch if unit.kind in ("embedding", "head") else regime.rows
    out = sum(matrix.out_features for matrix in unit.matrices)
    return Launch(rows, unit.matrices[0].in_features, ((out, format),))


def is_launched(unit: Unit, tied: bool) -> bool:
    """Whether a step multiplies by a unit; `tied` says that the embedding is the head."""
    return unit.kind != "embedding" or tied
