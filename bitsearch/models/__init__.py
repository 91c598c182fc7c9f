"""Open models, find what can be quantized in them, and reach their weights."""

from bitsearch.models.builtin import BUILTINS
from bitsearch.models.fingerprint import fingerprint
from bitsearch.models.layout import find_layout, find_units, skeleton
from bitsearch.models.load import LoadedModel, load_model, open_layout
from bitsearch.models.source import Source, resolve
from bitsearch.models.weights import read_weight, write_weight

__all__ = [
    "BUILTINS",
    "LoadedModel",
    "Source",
    "find_layout",
    "find_units",
    "fingerprint",
    "load_model",
    "open_layout",
    "read_weight",
    "resolve",
    "skeleton",
    "write_weight",
]
