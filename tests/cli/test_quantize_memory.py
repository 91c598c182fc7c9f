"""`quantize` takes the memory of a few matrices, however large the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitsearch.exporters.base import Reading
from bitsearch.exporters.pipeline import policy_of
from bitsearch.formats import parse_format
from bitsearch.models import fingerprint, open_layout
from bitsearch.policy import save_policy

MEASURED = """
import re, sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
import bitsearch.checkpoint, bitsearch.models.preparation, bitsearch.objectives.weights
import bitsearch.quantizers.integer, bitsearch.quantizers.rtn, bitsearch.restore
from bitsearch.formats import parse_format

torch.set_num_threads(1)
bitsearch.quantizers.rtn.quantize(torch.randn(512, 512), parse_format("int4-g64")).pack()
if sys.argv[4] == "whole":
    bitsearch.restore.open_stored = lambda *_: None
def peak():  # not that of getrusage, which counts the parent's memory before exec
    return int(re.search("VmHWM:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
bitsearch.checkpoint.quantize_model(
    sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), packed=sys.argv[5] == "packed", dtype=None,
    statistics=None, device="cpu", force=False, progress=lambda *_: None)
print(1024 * (peak() - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 158 million weights in bfloat16, and a policy for it."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    words = {f"w{number}": number for number in range(2000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    layout, _, source = open_layout(str(folder / "model"))
    formats = {m.name: parse_format("int4-g64") for unit in layout.units for m in unit.matrices}
    hashes = {key: value for key, value in fingerprint(source).items() if value}
    policy = policy_of(layout, hashes, Reading(formats), {})
    (folder / "policy.json").write_text(save_policy(policy))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["values", "packed"])
def test_peak_memory_is_that_of_a_few_matrices(large: Path, kind: str) -> None:
    """Far below the size of the model; loaded as a whole it takes more than that size."""
    size = (large / "model" / "model.safetensors").stat().st_size
    assert size > 300e6
    grown = {}
    for way in ("one_by_one", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(large / "model"), str(large / "policy.json"),
             str(large / f"{kind}-{way}"), way, kind],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown[way] = int(done.stdout.split()[-1])
    assert grown["one_by_one"] < 0.4 * size < 2 * size < grown["whole"], (grown, size)
    files = {
        way: {path.name: path.read_bytes() for path in (large / f"{kind}-{way}").iterdir()}
        for way in grown
    }
    assert files["one_by_one"] == files["whole"]
