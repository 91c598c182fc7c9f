"""What tools make of a configuration, module by module: TOOL CONFIG NAMES [MODEL].

Prints [bits, group size or −1, symmetric] by name, null for a module that is left alone.
"""

import json
import sys


def gptqmodel(config, names, _):
    from gptqmodel.quantization.config import QuantizeConfig

    parsed = QuantizeConfig.from_quant_config(config)
    found = {}
    for name in names:
        if parsed.dynamic_get(name) is False or (name == "lm_head" and not parsed.lm_head):
            found[name] = None
            continue
        fields = ("bits", "group_size", "sym")
        found[name] = [parsed.dynamic_get(name, f, getattr(parsed, f)) for f in fields]
    return found


def autoround(config, names, model):
    from types import SimpleNamespace

    import torch
    from auto_round.inference.convert_model import get_layer_config
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = get_layer_config(skeleton, SimpleNamespace(**config))
    found = {}
    for name in names:
        layer = layers.get(name)
        kept = layer is None or layer["bits"] >= 16
        found[name] = None if kept else [layer["bits"], layer["group_size"], layer["sym"]]
    return found


def torchao(config, names, _):
    from torchao.core.config import config_from_dict
    from torchao.quantization.quant_api import fqn_matches_fqn_config

    parsed = config_from_dict(config["quant_type"]["default"])
    found = {}
    for name in names:
        if not fqn_matches_fqn_config(name, parsed):
            found[name] = None
            continue
        workflow = parsed.fqn_to_config[name]
        bits = int(str(workflow.weight_dtype).removeprefix("torch.int"))
        group = getattr(workflow.granularity, "group_size", -1)
        found[name] = [bits, group, workflow.mapping_type.name == "SYMMETRIC"]
    return found


if __name__ == "__main__":
    tool, path, listed, *model = sys.argv[1:]
    with open(path) as file:
        content = json.load(file)
    content = content.get("quantization_config", content)
    resolve = {"gptqmodel": gptqmodel, "autoround": autoround, "torchao": torchao}[tool]
    print("RESULT", json.dumps(resolve(content, json.loads(listed), model[0] if model else None)))
