"""Tools quantize a model by what we wrote for them: TOOL MODEL CONFIGURATION OUT."""

import json
import sys

import torch


def tokens(count=16, length=128):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 1000, (count, length), generator=generator)


def opened(model, **more):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, **more).eval()


def gptqmodel(model, config, out):
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import QuantizeConfig

    with open(config) as file:
        parsed = QuantizeConfig.from_quant_config(json.load(file))
    parsed.device = "cpu"
    loaded = GPTQModel.load(model, parsed)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens()]
    loaded.quantize(rows, batch_size=4, backend=BACKEND.TORCH)
    loaded.save(out)


def autoround(model, config, out):
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    with open(config) as file:
        layers = json.load(file)
    AutoRound(
        opened(model), AutoTokenizer.from_pretrained(model), scheme="W4A16", iters=0,
        disable_opt_rtn=True, device_map="cpu", layer_config=layers,
    ).quantize_and_save(out, format="auto_round")  # fmt: skip


def torchao(model, config, out):
    from torchao.core.config import config_from_dict
    from transformers import TorchAoConfig

    with open(config) as file:
        parsed = config_from_dict(json.load(file)["quant_type"]["default"])
    loaded = opened(model, dtype=torch.bfloat16, quantization_config=TorchAoConfig(parsed))
    loaded.save_pretrained(out)


def modelopt(model, config, out):
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.torch.export import export_hf_checkpoint

    loaded = opened(model, dtype=torch.bfloat16)
    recipe = load_recipe(config)

    def forward(calibrated):
        for row in tokens(4, 32):
            calibrated(row[None])

    mtq.quantize(loaded, recipe.quantize.model_dump(), forward)
    export_hf_checkpoint(loaded, export_dir=out)


def bitsandbytes(model, config, out):
    from transformers import BitsAndBytesConfig

    with open(config) as file:
        fields = json.load(file)
    fields.pop("quant_method")
    loaded = opened(model, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**fields))
    kinds = {name: type(module).__name__ for name, module in loaded.named_modules()}
    return {name: kind for name, kind in kinds.items() if "Linear" in kind}


def hqq(model, config, out):
    from hqq.models.hf.base import AutoHQQHFModel

    with open(config) as file:
        layers = json.load(file)
    loaded = opened(model, dtype=torch.float32)
    AutoHQQHFModel.quantize_model(
        loaded, quant_config=layers, compute_dtype=torch.float32, device="cpu"
    )
    return {
        name: [module.meta["nbits"], module.meta["group_size"]]
        for name, module in loaded.named_modules()
        if type(module).__name__ == "HQQLinear"
    }


def llmcompressor(model, config, out):
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    loaded = opened(model)
    oneshot(model=loaded, recipe=config)
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print("RESULT", json.dumps(globals()[name](*arguments)))
