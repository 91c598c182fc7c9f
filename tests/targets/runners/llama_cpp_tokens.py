"""Tokens of texts and greedy continuations by llama.cpp: MODEL.gguf REQUEST.

REQUEST: `texts` to tokenize, token lists `prompts` to continue by `count` tokens, and
`logprobs`: how many of the best next tokens of each prompt to tell.
"""

import json
import sys
import urllib.request

import xllamacpp


def main() -> None:
    path, request = sys.argv[1], json.loads(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    # the model alone is compared: keys and values as they are
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(what: str, **body: object) -> dict:
        asked = urllib.request.Request(
            server.listening_address + what,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    same = {"temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True}
    found = {
        "tokens": [
            post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            for text in request["texts"]
        ],
        # it stops where the model ends its text
        "continuations": [
            post("/completion", prompt=prompt, n_predict=request["count"], **same)["tokens"]
            for prompt in request["prompts"]
        ],
        "logprobs": [
            [
                [found["id"], found["logprob"]]
                for found in post(
                    "/completion", prompt=prompt, n_predict=1, n_probs=request["logprobs"], **same
                )["completion_probabilities"][0]["top_logprobs"]
            ]
            for prompt in request["prompts"]
            if request["logprobs"]
        ],
    }
    print("RESULT", json.dumps(found))


main()
