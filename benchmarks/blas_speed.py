# SPDX-License-Identifier: Apache-2.0
"""Compare the BLAS that mlx-realign takes here with another, by the products of a training step, in turn.

    python benchmarks/blas_speed.py --other /usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 [--rounds 5]

--other: the file of a library, or `mlx` for MLX's own. Shapes are those of SmolLM2-135M with the batches of `peers.py`,
forward and backward, and one square one. Each round runs each library in a process of its own; GFLOP/s are medians over
rounds of the best of ten, through `mlx.core.matmul` in float32. Table, then one line of JSON.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

import launch

SHAPES = {  # name -> (rows, inner, columns, right one transposed), as mlx_lm's layers and their gradients call them
    "square": (1024, 1024, 1024, False),
    "attention in": (712, 576, 576, True),
    "keys": (712, 576, 192, True),
    "MLP in": (712, 576, 1536, True),
    "MLP out": (712, 1536, 576, True),
    "MLP in, gradient": (712, 1536, 576, False),
    "MLP out, gradient": (712, 576, 1536, False),
    "LoRA in": (712, 576, 8, False),
    "LoRA out": (712, 8, 1536, False),
    "head": (256, 576, 2048, True),
    "head, gradient": (256, 2048, 576, False),
    "decoding": (32, 576, 1536, True),
}
CHILD = """
import json, sys, time
import mlx_realign, mlx.core as mx
from mlx_realign import blas
found = {}
blas.keep_freed_memory()
for name, (m, k, n, flip) in json.loads(sys.argv[1]).items():
    a, b = mx.random.normal((m, k)), mx.random.normal((n, k) if flip else (k, n))
    mx.eval(a, b)
    times, repeats = [], max(1, int(2e8 / (m * k * n)))
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            mx.eval(a @ (b.T if flip else b))
        times.append((time.perf_counter() - start) / repeats)
    found[name] = 2e-9 * m * k * n / min(times)
print(json.dumps({"line": blas.in_use().line(), "gflops": found}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, help="the file of a library, or `mlx`")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    other = a.other if a.other == "mlx" else str(Path(a.other).absolute())
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "other": []}
    lines: dict[str, str] = {}
    ours = {"MLX_REALIGN_BLAS": ""} if "MLX_REALIGN_BLAS" not in os.environ else {}
    for _ in range(a.rounds):
        for name, variables in (("ours", ours), ("other", {"MLX_REALIGN_BLAS": other})):
            text, _, _ = launch.run([sys.executable, "-c", CHILD, json.dumps(SHAPES)], variables)
            found = launch.last_json(text)
            rows[name].append(found["gflops"])
            lines[name] = found["line"]
    median = {
        name: {shape: statistics.median(r[shape] for r in runs) for shape in SHAPES} for name, runs in rows.items()
    }
    ratios = {shape: median["ours"][shape] / median["other"][shape] for shape in SHAPES}
    mean = math.exp(statistics.fmean(math.log(r) for r in ratios.values()))
    table = [("GFLOP/s", "ours", "other", "ours : other")]
    for shape, ratio in ratios.items():
        table.append((shape, f"{median['ours'][shape]:.1f}", f"{median['other'][shape]:.1f}", f"{ratio:.2f}"))
    print("\n".join(f"{name}: {line}" for name, line in lines.items()))
    print(launch.table(table))
    print(f"geometric mean {mean:.2f}, worst {min(ratios.values()):.2f}")
    print(json.dumps({"machine": launch.machine(), "lines": lines, "gflops": median, "geometric_mean": mean}))


if __name__ == "__main__":
    main()
