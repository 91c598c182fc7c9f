"""Whether mlx-lm quantizes rows of 96 in groups of 32 under a global group of 32 and of 128."""

import json

import mlx.nn as nn
from mlx_lm.utils import quantize_model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(96, 64)


def main() -> None:
    found = {}
    for group in (32, 128):
        model, _ = quantize_model(
            Model(), {}, group, 4, quant_predicate=lambda *_: {"group_size": 32, "bits": 4}
        )
        found[str(group)] = isinstance(model.layer, nn.QuantizedLinear)
    print("RESULT", json.dumps(found))


main()
