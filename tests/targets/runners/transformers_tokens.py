"""Greedy tokens of a checkpoint that transformers opens: FOLDER DTYPE PROMPTS COUNT."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, dtype, prompts, count = sys.argv[1:5]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    found = []
    for prompt in json.loads(prompts):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            done = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=int(count),
                min_new_tokens=int(count),
            )
        found.append(done[0, len(prompt) :].tolist())
    print("RESULT", json.dumps(found))


main()
