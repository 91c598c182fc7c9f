"""Train the built-in model on the texts of corpus.py.

    python train.py prepare --corpus DIR --out DATA   # tokenizer and token files
    python train.py fit     --data DATA  --out MODEL  # the model; CUDA if there is one

The seed fixes the initial weights and the order of the windows. Two runs agree
bit by bit on one CPU; on CUDA the order of atomic sums leaves small differences.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|endoftext|>"
VOCABULARY, CONTEXT = 4096, 512
PARTS = ("train", "development")


def prepare(corpus: Path, out: Path) -> None:
    """Train the byte-level BPE on train.txt and write each part as uint16 tokens."""
    out.mkdir(parents=True, exist_ok=True)
    documents = {
        part: (corpus / f"{part}.txt").read_text("utf-8").rstrip("\n").split(f"\n{END}\n")
        for part in PARTS
    }
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(documents["train"], trainer)
    begin, end = bpe.token_to_id(BEGIN), bpe.token_to_id(END)
    # As with Llama's own tokenizer, an encoded text starts with the begin token.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, begin)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    ).save_pretrained(out / "tokenizer")
    for part, texts in documents.items():
        tokens = [token for text in bpe.encode_batch(texts) for token in (*text.ids, end)]
        np.array(tokens, dtype=np.uint16).tofile(out / f"{part}.bin")
        size = sum(len(text.encode()) for text in texts)
        print(f"{part}: {len(tokens)} tokens, {size / len(tokens):.2f} bytes a token")


def windows(tokens: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless (batch, CONTEXT + 1) windows; each epoch is shifted and shuffled anew."""
    while True:
        shift = int(torch.randint(CONTEXT, (), generator=generator))
        count = (len(tokens) - 1 - shift) // CONTEXT
        starts = shift + CONTEXT * torch.randperm(count, generator=generator)
        for chosen in starts.split(batch):
            if len(chosen) == batch:
                yield tokens[(chosen[:, None] + torch.arange(CONTEXT + 1)).to(tokens.device)]


def loss_of(model: Callable[..., Any], batch: Tensor) -> Tensor:
    """Mean negative log-likelihood, nats a token, of (batch, CONTEXT + 1) tokens."""
    with torch.autocast("cuda", torch.bfloat16, enabled=batch.is_cuda):
        logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.inference_mode()
def development_loss(model: nn.Module, tokens: Tensor, batch: int) -> float:
    """Loss over consecutive windows of the development part."""
    count = (len(tokens) - 1) // CONTEXT
    starts = CONTEXT * torch.arange(count)[:, None] + torch.arange(CONTEXT + 1)
    losses = [
        (float(loss_of(model, tokens[s.to(tokens.device)])), len(s)) for s in starts.split(batch)
    ]
    return sum(loss * size for loss, size in losses) / count


def fit(
    data: Path,
    out: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    decay: float,
    seed: int,
    every: int,
) -> None:
    """Train from scratch; writes the bfloat16 model, its tokenizer and training.json."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, device)  # transformers hides the types of its own .to
    # The key/value cache is for generation; here it would only break the compiled graph.
    model.config.use_cache = False
    tokens = {
        part: torch.from_numpy(np.fromfile(data / f"{part}.bin", np.uint16).astype(np.int64))
        for part in PARTS
    }
    tokens = {part: values.to(device) for part, values in tokens.items()}
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warmup = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup,
            0.01 + 0.495 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup))),
        ),
    )
    compiled: Callable[..., Any] = torch.compile(model) if device.type == "cuda" else model
    stream = windows(tokens["train"], batch, torch.Generator().manual_seed(seed))
    curve: list[dict[str, float]] = []
    total, begun = torch.zeros((), device=device), time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_of(compiled, next(stream))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % every == 0 or step == steps:
            point = {
                "step": step,
                "train": round(float(total) / (step - (curve[-1]["step"] if curve else 0)), 4),
                "development": round(development_loss(model, tokens["development"], batch), 4),
                "seconds": round(time.monotonic() - begun, 1),
            }
            total.zero_()
            curve.append(point)
            print(json.dumps(point), flush=True)
    model.config.use_cache = True
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(out)
    shutil.copytree(data / "tokenizer", out, dirs_exist_ok=True)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(tokens["train"]),
        "steps": steps,
        "tokens_a_step": batch * CONTEXT,
        "peak_learning_rate": rate,
        "weight_decay": decay,
        "seed": seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="train the tokenizer and write token files")
    first.add_argument("--corpus", type=Path, required=True)
    first.add_argument("--out", type=Path, required=True)
    second = commands.add_parser("fit", help="train the model")
    second.add_argument("--data", type=Path, required=True)
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--steps", type=int, default=1500)
    second.add_argument("--batch", type=int, default=128, help="windows of 512 tokens a step")
    second.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    # The usual 0.1 gave a higher development loss: README.md has the three runs.
    second.add_argument("--decay", type=float, default=1.0, help="weight decay")
    second.add_argument("--seed", type=int, default=0)
    second.add_argument("--every", type=int, default=250, help="steps between two measurements")
    options = vars(parser.parse_args())
    command = options.pop("command")
    (prepare if command == "prepare" else fit)(**options)


if __name__ == "__main__":
    main()
