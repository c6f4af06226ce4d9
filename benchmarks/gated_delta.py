# SPDX-License-Identifier: Apache-2.0
"""One training step of a small Qwen3.5-like model: gated deltas in chunks against mlx-lm's step a token, in turn.

    python benchmarks/gated_delta.py [--tokens 2048] [--rounds 3] [--width 512] [--heads 8] [--head-width 64]

A random model of mlx-lm's `qwen3_5` in float32, three layers in four of them gated delta, with LoRA on linear layers.
Both compute the value and the gradient of the adapter of the same next-token loss over one row, and say how long the
faster of two steps took and what the peaks were. mlx-lm's is its own model in training mode, nothing exchanged; ours is
the same model with this package's kernels. Both use one BLAS, that which mlx-realign picks here. Each round runs each
in a process of its own, A B A B; numbers are medians. Table, then one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys

import launch

STEPS = 2  # the first also makes what is kept
NAMES = {"ours": "chunks (ours)", "mlx-lm": "a step a token (mlx-lm)"}
CHILD = """
import json, sys, time
import mlx_realign, mlx.core as mx, mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_realign import blas, kernels

way, a = sys.argv[1], json.loads(sys.argv[2])
blas.keep_freed_memory()
text = {
    "model_type": "qwen3_5", "hidden_size": a["width"], "intermediate_size": 3 * a["width"], "vocab_size": 2048,
    "num_hidden_layers": a["layers"], "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_key_heads": a["heads"], "linear_num_value_heads": a["heads"], "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": a["head_width"], "linear_value_head_dim": a["head_width"], "full_attention_interval": 4,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "type": "default", "partial_rotary_factor": 0.25,
                        "mrope_section": [11, 11, 10]},
}
mx.random.seed(0)
model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": text}))
model.freeze()
linear_to_lora_layers(model, a["layers"], {"rank": 8, "scale": 2.0, "dropout": 0.0})
model.train()
if way == "ours":
    assert not (notes := kernels.install(model).notes), notes
row = mx.random.randint(0, 2048, (1, a["tokens"] + 1), key=mx.random.key(1))
loss = nn.value_and_grad(model, lambda: nn.losses.cross_entropy(model(row[:, :-1]), row[:, 1:]).mean())
mx.eval(model.parameters())
seconds = []
for _ in range(a["steps"]):
    mx.reset_peak_memory()
    start = time.perf_counter()
    value, slopes = loss()
    mx.eval(value, slopes)
    seconds.append(time.perf_counter() - start)
size = sum((x * x).sum() for _, x in tree_flatten(slopes)) ** 0.5
print(json.dumps({"seconds": min(seconds), "mlx_gb": mx.get_peak_memory() / 1e9, "loss": value.item(),
                  "gradient": size.item()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 2048, "rounds": 3, "width": 512, "heads": 8, "head_width": 64, "layers": 4}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    a = vars(parser.parse_args())
    found: dict[str, list[dict[str, float]]] = {way: [] for way in NAMES}
    loads = [os.getloadavg()[0]]
    for _ in range(a["rounds"]):
        for way in NAMES:
            text, _, resident = launch.run([sys.executable, "-c", CHILD, way, json.dumps({**a, "steps": STEPS})])
            found[way].append({**launch.last_json(text), "resident_gb": resident})
            loads.append(os.getloadavg()[0])
    median = {way: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for way, rows in found.items()}
    table = [("", "s a step", "MLX peak GB", "resident GB", "loss", "norm of the gradient")]
    for way, name in NAMES.items():
        m = median[way]
        numbers = (f"{m['seconds']:.2f}", f"{m['mlx_gb']:.2f}", f"{m['resident_gb']:.2f}")
        table.append((name, *numbers, f"{m['loss']:.6f}", f"{m['gradient']:.6f}"))
    print(launch.table(table))
    every = {way: sorted(round(row["seconds"], 2) for row in rows) for way, rows in found.items()}
    told = {**launch.machine(), **a, "seconds": every, "load": [round(load, 1) for load in loads], "median": median}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
