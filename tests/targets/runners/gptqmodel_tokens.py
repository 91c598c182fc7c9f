"""Greedy tokens of a checkpoint that GPTQModel opens: FOLDER DTYPE PROMPTS COUNT."""

import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel


def main() -> None:
    folder, dtype, prompts, count = sys.argv[1:5]
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=getattr(torch, dtype))
    found = []
    for prompt in json.loads(prompts):
        tokens = torch.tensor([prompt])
        done = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=int(count),
            min_new_tokens=int(count),
        )
        found.append(done[0, len(prompt) :].tolist())
    print("RESULT", json.dumps(found))


main()
