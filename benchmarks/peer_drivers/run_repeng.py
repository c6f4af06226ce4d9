# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Extracts and times control vectors of repeng 0.4.0, used as an installed package, unchanged.

    pip install --index-url https://download.pytorch.org/whl/cpu torch && pip install repeng==0.4.0

float32. A line of --data is {"positive", "negative"}: texts, templates and all, as the tokenizer gets them. Seconds
are those of `ControlVector.train`: from texts to one vector per layer.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from repeng import ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", choices=("pca_diff", "pca_center"), default="pca_diff")
    parser.add_argument("--batch", type=int, default=32, help="32 is its default")
    parser.add_argument("--rounds", type=int, default=1, help="how often to extract")
    parser.add_argument(
        "--output", type=Path, help="npz: layer -> vector; of the first round, and of the last as again.*"
    )
    parser.add_argument("--gguf", type=Path, help="export as well")
    a = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    rows = [json.loads(line) for line in a.data.read_text().splitlines()]
    pairs = [DatasetEntry(row["positive"], row["negative"]) for row in rows]
    seconds, found = [], []
    for _ in range(a.rounds):
        start = time.perf_counter()
        found.append(ControlVector.train(model, tokenizer, pairs, method=a.method, batch_size=a.batch))
        seconds.append(round(time.perf_counter() - start, 4))
    if a.output:
        arrays = {str(layer): vector for layer, vector in found[0].directions.items()}
        np.savez(a.output, **arrays, **{f"again.{k}": v for k, v in found[-1].directions.items()})
    if a.gguf:
        found[0].export_gguf(a.gguf)
    tokens = sum(len(tokenizer(row[side])["input_ids"]) for row in rows for side in ("positive", "negative"))
    print()
    print(json.dumps({"seconds": seconds, "tokens": tokens, "threads": torch.get_num_threads()}))


main()
