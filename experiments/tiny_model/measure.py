r"""Figures of the built-in model on its held-out evaluation text.

    python measure.py --model MODEL --text evaluation.txt --corpus corpus.json \
        --training training.json --out results.json

Windows are 511 tokens behind a begin token, without overlap; every token but the
begin token is predicted once. All figures are float32 unless said otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsearch.formats import parse_format
from bitsearch.quantizers.rtn import quantize

FORMATS = ("int8-g64", "int6-g64", "int5-g64", "int4-g64", "int3-g64", "int2-g64")
PROMPTS = (
    "She had always wanted to",
    "And the LORD said unto Moses,",
    "The ship was",
    "If the file does not exist, then",
    "This function returns",
)


@torch.inference_mode()
def token_losses(model: nn.Module, windows: list[Tensor]) -> Tensor:
    """Negative log-likelihood, nats, of every token but each window's first."""
    losses = []
    for window in windows:
        logits = model(window[None, :-1]).logits[0].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(losses).double()


def rounded(model: nn.Module, name: str) -> nn.Module:
    """A copy with every linear layer but the tied head rounded to nearest."""
    result = copy.deepcopy(model)
    for module_name, module in result.named_modules():
        if isinstance(module, nn.Linear) and module_name != "lm_head":
            module.weight.data = quantize(module.weight.data, parse_format(name)).dequantize()
    return result


def load(folder: Path) -> tuple[Any, float]:
    """The model in float32, and the seconds of the faster of two loads (the first imports)."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        times.append(time.perf_counter() - begun)
    return model, min(times)


def measure(folder: Path, text: str) -> dict[str, object]:
    """Perplexities, rounding losses, load time and continuations."""
    model, seconds = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = torch.tensor([tokenizer.bos_token_id])
    windows = [torch.cat([begin, part]) for part in ids.split(511)]
    full = token_losses(model, windows)
    half = token_losses(copy.deepcopy(model).to(torch.bfloat16), windows)
    counts = Counter(ids.tolist())
    unigram = -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
    size = len(text.encode())
    continuations = {}
    for prompt in PROMPTS:
        output = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False
        )
        continuations[prompt] = tokenizer.decode(output[0, 1:], skip_special_tokens=True)
    return {
        "tokens": len(ids),
        "bytes_per_token": round(size / len(ids), 3),
        "nll_per_token": round(float(full.mean()), 4),
        "perplexity_per_token": round(math.exp(float(full.mean())), 2),
        "perplexity_per_byte": round(math.exp(float(full.sum()) / size), 3),
        "bits_per_byte": round(float(full.sum()) / size / math.log(2), 3),
        "nll_per_token_bfloat16": round(float(half.mean()), 4),
        "mean_absolute_difference_bfloat16": round(float((half - full).abs().mean()), 4),
        "unigram_entropy_nats": round(unigram, 4),
        "unigram_perplexity": round(math.exp(unigram), 1),
        "nll_per_token_rtn": {
            name: round(float(token_losses(rounded(model, name), windows).mean()), 4)
            for name in FORMATS
        },
        "load_seconds": round(seconds, 2),
        "greedy_continuations": continuations,
    }


def main() -> None:
    """Measure, and write one file with the corpus, the training and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="corpus.json of corpus.py")
    parser.add_argument("--training", type=Path, required=True, help="training.json of train.py")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.text.read_text("utf-8"))
    results = {
        "corpus": json.loads(arguments.corpus.read_text()),
        "training": json.loads(arguments.training.read_text()),
        "evaluation": figures,
        "measured_with": {"torch": torch.__version__, "processor": platform.machine()},
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
