"""What transformers does not open, for which documentation and targets make allowance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bitsearch.exporters.pipeline import export_policy

HERE = Path(__file__).parent
Make = Callable[[Mapping[str, str]], Path]
# (exporter, package, what, formats of two matrices, what transformers says)
REFUSED = [
    ("compressed-tensors", "compressed-tensors", "one matrix with zero points",
     ("int4-g64", "int4-g64-sym"), "weight_zero_point"),
    ("gptqmodel", "gptqmodel", "two formats (`dynamic` is not read)",
     ("int4-g64-sym", "int8-g32-sym"), "down_proj.qweight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "package", "what", "formats", "said"), REFUSED, ids=[row[0] for row in REFUSED]
)
def test_transformers_opens_no(
    environment: Any, record: Any, make_policy: Make, tmp_path: Path, target: str, package: str,
    what: str, formats: tuple[str, str], said: str,
) -> None:  # fmt: skip
    """If it does one day, target and page of the exporter may say more."""
    tools = environment("export")
    path = make_policy({f"{block}.mlp.down_proj": name for block, name in enumerate(formats)})
    export_policy(path, target, tmp_path / "out", model="tiny", dtype="float32")
    script = str(HERE / "runners" / "transformers_tokens.py")
    done = tools.call([script, str(tmp_path / "out"), "float32", "[[1, 2, 3]]", "3"])
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr and said in done.stderr, done.stderr[-3000:]
    versions = f"{tools.version('transformers')} with {tools.version(package)}"
    record(target, versions, f"opens a checkpoint with {what}", "refused: shapes do not match")
