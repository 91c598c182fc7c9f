"""Greedy tokens of a graph of tokens to logits: FILE.onnx PROMPTS COUNT."""

import json
import sys

import numpy as np
import onnxruntime


def main() -> None:
    session = onnxruntime.InferenceSession(sys.argv[1])
    found = []
    for prompt in json.loads(sys.argv[2]):
        tokens = list(prompt)
        for _ in range(int(sys.argv[3])):
            (logits,) = session.run(None, {"input_ids": np.array([tokens])})
            tokens.append(int(logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    print("RESULT", json.dumps(found))


main()
