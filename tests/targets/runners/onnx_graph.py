"""A graph of tokens to logits, by torch.onnx: FOLDER OUT.onnx."""

import sys

import torch
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def main() -> None:
    folder, out = sys.argv[1:3]
    with torch.no_grad():
        torch.onnx.export(
            Logits(folder),
            (torch.arange(2, 18)[None],),
            out,
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=256)}},
        )
    print("RESULT", 1)


main()
