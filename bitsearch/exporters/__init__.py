"""The exporters by name: a policy, in the files that another tool reads.

Each is one file with an `EXPORTER` (`bitsearch.exporters.base.Exporter`). Other packages
add theirs under the entry-point group `bitsearch.exporters`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from bitsearch import registry

if TYPE_CHECKING:
    from bitsearch.exporters.base import Exporter

GROUP = "bitsearch.exporters"

EXPORTERS = {
    "compressed-tensors": "bitsearch.exporters.compressed_tensors:EXPORTER",
    "gptqmodel": "bitsearch.exporters.gptqmodel:EXPORTER",
    "autoround": "bitsearch.exporters.autoround:EXPORTER",
    "torchao": "bitsearch.exporters.torchao:EXPORTER",
    "modelopt": "bitsearch.exporters.modelopt:EXPORTER",
    "bitsandbytes": "bitsearch.exporters.bitsandbytes:EXPORTER",
    "hqq": "bitsearch.exporters.hqq:EXPORTER",
    "vllm-kv": "bitsearch.exporters.kv_cache:VLLM",
    "transformers-kv": "bitsearch.exporters.kv_cache:TRANSFORMERS",
    "llama.cpp": "bitsearch.exporters.llama_cpp:EXPORTER",
    "exllamav3": "bitsearch.exporters.exllamav3:EXPORTER",
    "mlx": "bitsearch.exporters.mlx:EXPORTER",
    "onnxruntime": "bitsearch.exporters.onnxruntime:EXPORTER",
}


def exporter_names() -> list[str]:
    """Every exporter."""
    return registry.names(GROUP, EXPORTERS)


def load_exporter(name: str) -> Exporter:
    """The exporter of a name.

    Raises:
        UsageError: no such exporter.
    """
    return cast("Exporter", registry.load(GROUP, EXPORTERS, name))
