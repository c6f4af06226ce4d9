# SPDX-License-Identifier: Apache-2.0
"""Time sft on short rows with and without --pack, in turn.

    python benchmarks/packing.py --model DIR [--rounds 2] [--batch-sizes 8 32]

500 rows, log-normal lengths (median 40 tokens, sigma 0.8), shuffled (rows of near length together) and in the order of
the file. Each run is a process of its own; real tokens a second are medians over its optimizer steps but the first.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import launch
import numpy as np

CHILD = """
import contextlib, io, json, sys
from importlib import import_module
options = json.loads(sys.argv[1])
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import_module("mlx_realign.train").train(**options)
"""


def rows(path: Path) -> None:
    """500 rows of random words."""
    rng = np.random.default_rng(7)
    words = "the a of to and in is it you that he was for on are with as his they be at one have this".split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(500):
            prompt, completion = (max(2, int(20 * np.exp(0.8 * rng.normal()))) for _ in range(2))
            texts = [" ".join(rng.choice(words, n)) for n in (prompt, completion)]
            file.write(json.dumps({"prompt": texts[0], "completion": texts[1]}) + "\n")


def run(model: str, data: Path, size: int, steps: int, **options: Any) -> tuple[float, float]:
    """(real tokens a second, peak GB)."""
    with tempfile.TemporaryDirectory() as output:
        common = {"model": model, "data": str(data), "output": output, "batch_size": size, "steps": steps}
        asked = {"method": "sft", "kl_every": 0, "chat_template": False, **common, **options}
        launch.run([sys.executable, "-c", CHILD, json.dumps(asked)])
        lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines][1:]
    return statistics.median(r["tokens_per_second"] for r in found), max(r["peak_memory_gb"] for r in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    a = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        rows(data)
        for size in a.batch_sizes:
            for shuffle in (True, False):
                made: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for _ in range(a.rounds):
                    for pack in made:
                        made[pack].append(run(a.model, data, size, max(4, 96 // size), shuffle=shuffle, pack=pack))
                plain, packed = (statistics.median(speed for speed, _ in made[pack]) for pack in made)
                peaks = [max(peak for _, peak in made[pack]) for pack in made]
                found.append([size, "shuffled" if shuffle else "as in the file", plain, packed, packed / plain, *peaks])
    print("| rows a batch | order | tokens/s | packed | ratio | GB | packed |\n|---|---|---|---|---|---|---|")
    for size, order, plain, packed, ratio, gb, less in found:
        print(f"| {size} | {order} | {plain:.0f} | {packed:.0f} | {ratio:.2f} | {gb:.2f} | {less:.2f} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
