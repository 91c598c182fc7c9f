"""The 16-bit floats, which keep weights as they are."""

from __future__ import annotations

from bitsearch.formats.base import Format


class SixteenBits(Format):
    """bfloat16 or float16."""

    @property
    def name(self) -> str:
        return self.kind

    @property
    def family(self) -> str:
        return ""

    @property
    def exact(self) -> bool:
        return True

    def bytes(self, out_features: int, in_features: int) -> int:
        return 2 * out_features * in_features


BF16 = SixteenBits("bf16", 16)
FP16 = SixteenBits("fp16", 16)


def parse(name: str) -> SixteenBits | None:
    """Read a name; None if it is of another family."""
    return {"bf16": BF16, "fp16": FP16}.get(name)
