"""Greedy tokens of a folder that mlx-lm opens: FOLDER DTYPE PROMPTS COUNT.

DTYPE `stored` computes in the dtype of the file, `float32` widens its constants first.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def main() -> None:
    folder, dtype, prompts, count = sys.argv[1:5]
    model, _ = load_model(Path(folder))
    if dtype != "stored":
        model.set_dtype(getattr(mx, dtype))
    found = []
    for prompt in json.loads(prompts):
        cache = model.make_cache() if hasattr(model, "make_cache") else None
        if cache is None:
            from mlx_lm.models.cache import make_prompt_cache

            cache = make_prompt_cache(model)
        tokens, new = mx.array([prompt]), []
        for _ in range(int(count)):
            logits = model(tokens, cache=cache)[0, -1]
            new.append(int(mx.argmax(logits)))
            tokens = mx.array([[new[-1]]])
        found.append(new)
    print("RESULT", json.dumps(found))


main()
