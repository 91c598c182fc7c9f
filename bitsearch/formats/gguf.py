"""The block types of GGUF files that weights are encoded into: `gguf-q4_k`, `gguf-q8_0` …

Sizes are those of ggml's blocks, scales included; rows must be whole blocks (32 or
256 weights). `gguf-mxfp4` holds the values of `mxfp4` in ggml's own order.
"""

from __future__ import annotations

from collections.abc import Mapping

from bitsearch.formats.base import Format

# (bits, weights of a block, its bytes, weights that share a scale)
BLOCKS: Mapping[str, tuple[int, int, int, int]] = {
    "gguf-q2_k": (2, 256, 84, 16),
    "gguf-q3_k": (3, 256, 110, 16),
    "gguf-q4_k": (4, 256, 144, 32),
    "gguf-q5_k": (5, 256, 176, 32),
    "gguf-q6_k": (6, 256, 210, 16),
    "gguf-q4_0": (4, 32, 18, 32),
    "gguf-q4_1": (4, 32, 20, 32),
    "gguf-q5_0": (5, 32, 22, 32),
    "gguf-q5_1": (5, 32, 24, 32),
    "gguf-q8_0": (8, 32, 34, 32),
    "gguf-iq4_nl": (4, 32, 18, 32),
    "gguf-iq4_xs": (4, 256, 136, 32),
    "gguf-mxfp4": (4, 32, 17, 32),
}


class GgufFormat(Format):
    """A block type of ggml."""

    @property
    def name(self) -> str:
        return self.kind

    @property
    def family(self) -> str:
        ending = self.kind.rpartition("_")[2]
        return "gguf-mxfp" if self.kind == "gguf-mxfp4" else f"gguf-{ending}"

    @property
    def block(self) -> int:
        """Weights of a block."""
        return BLOCKS[self.kind][1]

    def bytes(self, out_features: int, in_features: int) -> int:
        _, weights, size, _ = BLOCKS[self.kind]
        return out_features * -(-in_features // weights) * size

    def fits(self, in_features: int) -> bool:
        return in_features % self.block == 0


def parse(name: str) -> GgufFormat | None:
    """Read a name; None if it is of another family."""
    if name not in BLOCKS:
        return None
    bits, _, _, group = BLOCKS[name]
    signed = ("gguf-q3_k", "gguf-q6_k", "gguf-iq4_nl", "gguf-iq4_xs")
    symmetric = name in signed or name.endswith(("_0", "mxfp4"))
    return GgufFormat(name, bits, group, symmetric)
