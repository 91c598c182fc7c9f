"""What vLLM makes of a configuration, by its own names of modules: CONFIG NAMES.

Prints [bits, group size or −1, symmetric] by name, null for a module that is left alone,
and the error's text where vLLM refuses.
"""

import json
import sys
from copy import deepcopy

import torch

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def compressed_tensors(config):
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    parsed = CompressedTensorsConfig.from_config(config)
    parsed.packed_modules_mapping = FUSED

    def resolve(name):
        scheme = parsed.get_scheme_dict(torch.nn.Linear(1, 1), name)
        if scheme is None:
            return None
        weights = scheme["weights"]
        return [weights.num_bits, weights.group_size or -1, weights.symmetric]

    return resolve


def gptq(config):
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils.gptq_utils import (
        get_dynamic_override,
        override_config,
    )

    parsed = AutoGPTQConfig.from_config(config)

    def resolve(name):
        if get_dynamic_override(parsed, name) is False:
            return None
        own = deepcopy(parsed)
        override_config(own, name)
        return [own.weight_bits, own.group_size, own.is_sym]

    return resolve


def inc(config):
    from vllm.model_executor.layers.quantization.inc.inc import INCConfig
    from vllm.model_executor.layers.quantization.inc.schemes import factory

    parsed = INCConfig.from_config(config)
    parsed.packed_modules_mapping = FUSED
    found = []
    factory.resolve_scheme = found.append  # what it would look for a kernel for

    def resolve(name):
        found.clear()
        parsed.get_quant_method(torch.nn.Linear(1, 1), name)
        return [found[0].bits, found[0].group_size, found[0].sym] if found else None

    return resolve


METHODS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "auto-round": inc}

if __name__ == "__main__":
    path, listed = sys.argv[1:]
    with open(path) as file:
        content = json.load(file)
    content = content.get("quantization_config", content)
    found = {}
    try:
        look_up = METHODS[content["quant_method"]](content)
    except (ValueError, AssertionError) as error:
        print("RESULT", json.dumps(str(error)))
        raise SystemExit from error
    for module in json.loads(listed):
        try:
            found[module] = look_up(module)
        except ValueError as error:
            found[module] = str(error)
    print("RESULT", json.dumps(found))
