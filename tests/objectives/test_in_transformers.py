"""Models of transformers on a device's kernels: the same logits, one launch a fused set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from bitsearch.formats import Format, parse_format
from bitsearch.kernels.devices import Launch
from bitsearch.kernels.regime import parse_regime
from bitsearch.models.layout import find_layout
from bitsearch.models.weights import read_weight, write_weight
from bitsearch.objectives.cost.assemble import Weights
from bitsearch.objectives.cost.in_transformers import InTransformers
from bitsearch.quantizers.rtn import quantize
from bitsearch.testing_devices import Clockwork
from bitsearch.units import ModelLayout, Unit

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64},
    "phi": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gemma3_text": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
    },
}  # fmt: skip


class Counting(Clockwork):
    """Counts the launches that are run."""

    ran = 0

    def linear(self, launch: Launch, parts: Any) -> Any:
        inner = super().linear(launch, parts)

        def run(x: Any) -> Any:
            self.ran += 1
            return inner(x)

        return run


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_quantized_model(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=96, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    layout = find_layout(model, reference=family)
    format = parse_format("int4-g32")
    device = Counting({"int4-g32": 1.0})
    ids = torch.randint(3, 96, (1, 9))
    weights = Weights(lambda unit, _: parts_of(model, unit, format), model)
    assembled = InTransformers(
        device, layout, config, lambda unit: (format.name, weights.parts(unit, format)),
        parse_regime("prefill=9"), model,
    )  # fmt: skip
    found = assembled.step.run(ids, DynamicCache(config=config))
    expected = quantized_logits(model, layout, ids, format)
    assert torch.allclose(found, expected, atol=1e-4)
    launched = [unit for unit in layout.units if unit.kind != "embedding" or layout.tied]
    assert device.ran == len(launched)
    device.ran = 0
    assembled.stack.sample()
    assert device.ran == len(launched)
    assembled.close()


def test_every_step_starts_from_the_same_cache() -> None:
    config = AutoConfig.for_model("llama", vocab_size=96, **FAMILIES["llama"])
    layout = find_layout(AutoModelForCausalLM.from_config(config), reference="llama")
    device = Counting({"int4-g32": 1.0})
    assembled = InTransformers(
        device, layout, config, lambda _: ("int4-g32", None), parse_regime("batch=2,context=12"),
        None,
    )  # fmt: skip
    for _ in range(2):
        assembled.step.sample()
        assert assembled.step.cache.get_seq_length() == 11
    assert device.ran == 2 * len(layout.units)


def parts_of(model: Any, unit: Unit, format: Format) -> list[Any]:
    """The unit's matrices in a format."""
    return [quantize(read_weight(model, matrix), format) for matrix in unit.matrices]


def quantized_logits(model: Any, layout: ModelLayout, ids: Any, format: Format) -> Any:
    """Logits of the last token with every launched unit's values in place; the embedding's
    lookup stays as it is.
    """
    embedding = model.get_input_embeddings()
    looked_up = embedding.weight.detach().clone()
    for unit in layout.units:
        if unit.kind == "embedding" and not layout.tied:
            continue
        for matrix, part in zip(unit.matrices, parts_of(model, unit, format), strict=True):
            write_weight(model, matrix, part.dequantize())
    hook = embedding.register_forward_hook(
        lambda _, args, __: (
            torch.nn.functional.embedding(args[0], looked_up)
            * getattr(embedding, "scalar_embed_scale", 1.0)
        )
    )
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    hook.remove()
    return logits
