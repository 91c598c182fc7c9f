"""What every numeric format tells about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Format(ABC):
    """A numeric format; each family is a subclass in a file of its own.

    Attributes:
        kind: the family, or the one format of a family without variants.
        bits: code bits of one weight.
        group_size: input columns sharing one scale; None for a whole row.
        symmetric: no zero point is stored.
    """

    kind: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The short form, as it appears in a policy."""

    @property
    @abstractmethod
    def family(self) -> str:
        """What formats share that differ in width alone; '' if weights are kept as they are."""

    @property
    def exact(self) -> bool:
        """Whether weights of that 16-bit type are kept as they are."""
        return False

    @abstractmethod
    def bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of an (out_features, in_features) matrix, metadata included."""

    def fits(self, in_features: int) -> bool:
        """Whether rows of that length can be stored."""
        return True

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


def group_suffix(group_size: int | None) -> str:
    """`g64`, or `row`."""
    return "row" if group_size is None else f"g{group_size}"
