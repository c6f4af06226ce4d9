# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of every method and of a search for an ablation: what goes on equals what never stopped.

python tests/reliability/kills.py --kills 6
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from common import METHODS, Bench, table

CLOCKS = ("step_s", "tokens_per_second", "peak_memory_gb", "rollout_s", "rollout_tokens_per_second")
CASES = [(method, ()) for method in METHODS] + [("sft", ("--full",)), ("dpo", ("--full", "--optimizer", "adafactor"))]


def rows(path: Path) -> list[dict[str, object]]:
    """Of metrics.jsonl, without what is measured by a clock."""
    found = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in found]


def killed(bench: Bench, words: list[str], longest: float, count: int, rng: random.Random) -> list[float]:
    """Start, kill, go on, `count` times, at moments drawn from the time that the whole takes; then let it end."""
    moments = []
    resume = "--output" in words and words[words.index("--output") + 1]
    for _ in range(count):
        going_on = resume and (Path(resume) / "metrics.jsonl").exists()
        process = bench.start([*words, *(["--resume"] if going_on else [])], "cache-killed")
        moments.append(rng.uniform(0.3, longest))
        time.sleep(moments[-1])
        process.kill()
        process.communicate()
    going_on = resume and (Path(resume) / "metrics.jsonl").exists()
    process = bench.start([*words, *(["--resume"] if going_on else [])], "cache-killed")
    _, said = process.communicate(timeout=600)
    if process.returncode:
        print(said[-800:], file=sys.stderr)
    return moments


def trained(bench: Bench, method: str, more: tuple[str, ...], kills: int, rng: random.Random) -> list[object]:
    """One row of the table: a run that was killed beside one that was not."""
    name = " ".join((method, *more))
    folder = bench.folder / name.replace(" ", "")
    steps = ("--steps", 14, "--save-every", 1, "--keep", 2, *more)
    began = time.monotonic()
    straight = bench.start(bench.words(method, folder / "straight", *steps))
    straight.communicate(timeout=600)
    longest = time.monotonic() - began
    killed(bench, bench.words(method, folder / "killed", *steps), longest, kills, rng)
    result = "model/model.safetensors" if "--full" in more else "adapters.safetensors"
    one, two = folder / "straight", folder / "killed"
    same = (two / result).exists() and (one / result).read_bytes() == (two / result).read_bytes()
    told = same and rows(one / "metrics.jsonl") == rows(two / "metrics.jsonl")
    left = sorted(path.name for path in (two / "checkpoints").iterdir())
    clean = left == sorted(path.name for path in (one / "checkpoints").iterdir()) and not (two / ".lock").exists()
    return [name, kills, same, told, clean]


def searched(bench: Bench, kills: int, rng: random.Random) -> list[object]:
    """A search that was killed picks what one that was not picks."""
    for name, start in (("positive", "Tell me about"), ("negative", "Count up to")):
        prompts = [f"{start} {word} {i}\n" for i in range(12) for word in ("a", "b")]
        (bench.folder / f"{name}.txt").write_text("".join(prompts))
    words = [sys.executable, "-m", "mlx_realign.ablate", "--model", str(bench.model), "--search", "--trials", "8"]
    words += ["--positive", str(bench.folder / "positive.txt"), "--negative", str(bench.folder / "negative.txt")]
    words += ["--markers", "a,e,i", "--max-new-tokens", "6", "--json", "--dtype", "float32"]
    began, seen = time.monotonic(), {}
    for name in ("straight", "killed"):
        output = bench.folder / f"ablated-{name}"
        own = [*words, "--journal", str(bench.folder / f"{name}.jsonl"), "--output", str(output)]
        if name == "killed":
            longest = time.monotonic() - began
            for _ in range(kills):
                process = bench.start(own)
                time.sleep(rng.uniform(1.0, longest))
                process.kill()
                process.communicate()
        process = bench.start(own)
        _, said = process.communicate(timeout=600)
        if process.returncode and not output.exists():  # it may have been done before the last kill
            print(said[-800:], file=sys.stderr)
        file = output / "adapters.safetensors"
        seen[name] = file.read_bytes() if file.exists() else b""
    same = bool(seen["straight"]) and seen["straight"] == seen["killed"]
    return ["ablate --search", kills, same, "-", not list(bench.folder.glob(".ablated*"))]


def main() -> int:
    """Print a table; 1 where anything differs."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--kills", type=int, default=6, help="kills of each run before it may end")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        found = [trained(bench, method, more, given.kills, rng) for method, more in CASES]
        found.append(searched(bench, given.kills, rng))
    print(table(["run", "kills", "result byte for byte", "metrics equal", "nothing left over"], found))
    return int(not all(value for row in found for value in row))


if __name__ == "__main__":
    raise SystemExit(main())
