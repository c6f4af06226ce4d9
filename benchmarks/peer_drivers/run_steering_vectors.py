# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Extracts and times vectors of steering-vectors 0.12.2, used as an installed package, unchanged.

    pip install --index-url https://download.pytorch.org/whl/cpu torch && pip install steering-vectors==0.12.2

float32, its default aggregator (the mean of the differences). Data and seconds as in `run_repeng.py`.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from steering_vectors import train_steering_vector
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1, help="pairs; 1 is its default")
    parser.add_argument("--rounds", type=int, default=1, help="how often to extract")
    parser.add_argument("--output", type=Path, help="npz: layer -> vector")
    a = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    rows = [json.loads(line) for line in a.data.read_text().splitlines()]
    pairs = [(row["positive"], row["negative"]) for row in rows]
    seconds, found = [], None
    for _ in range(a.rounds):
        start = time.perf_counter()
        found = train_steering_vector(model, tokenizer, pairs, batch_size=a.batch)
        seconds.append(round(time.perf_counter() - start, 4))
    if a.output and found:
        np.savez(a.output, **{str(k): v.numpy() for k, v in found.layer_activations.items()})
    tokens = sum(len(tokenizer(text)["input_ids"]) for pair in pairs for text in pair)
    print()
    print(json.dumps({"seconds": seconds, "tokens": tokens, "threads": torch.get_num_threads()}))


main()
