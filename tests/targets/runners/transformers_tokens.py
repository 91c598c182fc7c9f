"""Greedy tokens of a checkpoint that transformers opens: FOLDER DTYPE PROMPTS COUNT.

DTYPE `unpacked` opens it in bfloat16, has it unpacked, and computes in float32.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, dtype, prompts, count = sys.argv[1:5]
    opened = torch.bfloat16 if dtype == "unpacked" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=opened).eval()
    if dtype == "unpacked":
        model(torch.tensor([[0]]))
        torch.nn.Module.float(model)  # transformers refuses it of quantized models
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
