"""Greedy tokens of a checkpoint in vLLM on CPU: FOLDER DTYPE PROMPTS COUNT [ARGUMENTS]."""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, dtype, prompts, count = sys.argv[1:5]
    more = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4, **more)
    sampling = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True)
    # one by one: a batch may round otherwise
    found = []
    for prompt in json.loads(prompts):
        done = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        found.append(list(done[0].outputs[0].token_ids))
    print("RESULT", json.dumps(found))


main()
