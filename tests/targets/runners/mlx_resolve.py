"""How mlx-lm builds each module of a folder, and its rotary base: FOLDER."""

import json
import sys
from pathlib import Path

import mlx.nn as nn
from mlx_lm.utils import load_model


def main() -> None:
    model, _ = load_model(Path(sys.argv[1]))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            found[name] = [module.group_size, module.bits, module.mode]
        elif isinstance(module, nn.Linear | nn.Embedding):
            found[name] = None
    rope = model.layers[0].self_attn.rope
    print("RESULT", json.dumps({"modules": found, "rope": getattr(rope, "base", None)}))


main()
