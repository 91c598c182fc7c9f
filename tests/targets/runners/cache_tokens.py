"""Greedy tokens of a model with a cache of `kv_cache.json`: FOLDER CACHE PROMPTS COUNT."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer, HQQQuantizedLayer


def main() -> None:
    folder, path, prompts, count = sys.argv[1:]
    with open(path) as file:
        layers = json.load(file)["layers"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, kinds = [], []
    for prompt in json.loads(prompts):
        cache = Cache(
            layers=[
                DynamicLayer() if said is None else HQQQuantizedLayer(**said) for said in layers
            ]
        )
        tokens = torch.tensor([prompt])
        done = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=int(count),
            min_new_tokens=int(count),
        )
        found.append(done[0, len(prompt) :].tolist())
        kinds = [getattr(layer, "nbits", 16) for layer in cache.layers]
    print("RESULT", json.dumps([kinds, found]))


main()
