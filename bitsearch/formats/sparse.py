"""A base with single weights on top in 16 bits: `int3-g16+sparse1%`, `lut3-row+sparse0.45%`.

W = dense + sparse, as SqueezeLLM (Kim et al., ICML 2024, section 4.2) and SpQR (Dettmers
et al., ICLR 2024, section 4) store it: compressed rows. The number of outliers is a share
of the matrix, rounded up, however they fall on its rows.

Bytes: 4 an outlier (float16 value, uint16 column); 4 for each row's start and for the end;
all weights in the base format.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitsearch.formats.base import Format
from bitsearch.formats.split import MOST_COLUMNS, SplitFormat, parse_percent, percent, share_of


@dataclass(frozen=True, kw_only=True)
class SparseFormat(SplitFormat):
    """A base and a sparse matrix.

    Attributes:
        share: outliers, in millionths of the weights.
    """

    share: int

    @property
    def ending(self) -> str:
        return f"sparse{percent(self.share)}"

    def outliers(self, out_features: int, in_features: int) -> int:
        """How many weights of a matrix are outliers."""
        return share_of(self.share, out_features * in_features)

    def fits(self, in_features: int) -> bool:
        return in_features <= MOST_COLUMNS and self.base.fits(in_features)

    def bytes(self, out_features: int, in_features: int) -> int:
        sparse = 4 * self.outliers(out_features, in_features) + 4 * (out_features + 1)
        return sparse + self.base.bytes(out_features, in_features)


def parse(base: Format, ending: str) -> SparseFormat | None:
    """Read what follows the base; None if it is of another family."""
    if not ending.startswith("sparse"):
        return None
    share = parse_percent(ending.removeprefix("sparse"))
    if share is None:
        return None
    return SparseFormat(
        "sparse", base.bits, base.group_size, base.symmetric, base=base, share=share
    )
