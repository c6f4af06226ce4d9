# SPDX-License-Identifier: Apache-2.0
"""What steering costs while decoding: tokens per second with and without, in alternated pairs, and operations added.

    python benchmarks/steering.py --model MODEL [--batch 1,8] [--pairs 50] [--steer add-1,add-all]

A pair is --tokens decode steps without steering and as many with it, of two batches of the same prompt, step by step
in turn, so that a machine that slows down slows both; which is first changes from step to step, and from pair to pair
which gets its memory first. Prompts are computed before the clock starts, and the first two steps are not timed.
Steering is put on while the clock stands, and before a step without it put on and taken off, so that what comes before
a step is alike. The cost is 1 - tokens/s with : tokens/s without, of each pair; the table gives its mean over pairs and
the bounds of its 95% interval (Student's t).
Vectors are random, a thousandth of the stream's size: what is timed is arithmetic, whose time does not depend on them.
Operations are counted in MLX's graph of one step, views and reshapes included.
"""

import argparse
import json
import math
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import launch
import mlx.core as mx
import numpy as np

from mlx_realign import blas, data, taps
from mlx_realign.decoding import Decoder, Row
from mlx_realign.policy import Policy
from mlx_realign.sampling import Sampling
from mlx_realign.steering import Schedule, Steer, Steering, steer
from mlx_realign.vectors import Direction

PROMPT = "Write a long story about a lighthouse keeper and the garden that she made among the rocks."
WARM_UP = 2
T_95 = {9: 2.262, 19: 2.093, 29: 2.045, 49: 2.010, 99: 1.984}  # Student's t, two-sided, by degrees of freedom

Kind = Callable[[Policy, int], Steering]  # a policy and the rows of a batch -> the steering put on


def kinds(direction: Direction, blocks: list[int]) -> dict[str, Kind]:
    """Name -> how to put it on. -1: behind the middle block; -all: behind every block."""
    middle = (blocks[len(blocks) // 2],)

    def one(**options: Any) -> Kind:
        return lambda policy, rows: steer(policy, Steer(direction, **options))

    def each_row(policy: Policy, rows: int) -> Steering:
        return steer(policy, rows=[[Steer(direction, coefficient=1.0 + i, blocks=middle)] for i in range(rows)])

    return {
        "add-1": one(blocks=middle),
        "add-all": one(),
        "rows-1": each_row,
        "ablate-1": one(blocks=middle, operator="ablate"),
        "ablate-all": one(operator="ablate"),
        "angular-all": one(operator="angular", angle=10.0, second=_turned(direction)),
        "generated-1": one(blocks=middle, positions="generated", schedule=Schedule("decay", 32)),
    }


def _turned(direction: Direction) -> Direction:
    return Direction({block: np.roll(vector, 1) for block, vector in direction.vectors.items()})


def decoder(policy: Policy, rows: int, tokens: int, variants: bool) -> Decoder:
    """Rows of one prompt, computed, after the steps that are not timed."""
    prompt = np.array(data.encode_prompt(PROMPT, policy.tokenizer), np.int32)
    made = Decoder(policy, Sampling(max_new_tokens=tokens + WARM_UP, temperature=0), grouped=True)
    zeros = np.zeros(tokens + WARM_UP, np.float32)
    made.exchange([], [Row(prompt, i, zeros, variant=i if variants else 0) for i in range(rows)])
    for _ in range(WARM_UP):
        made.step()
    return made


def pair(policy: Policy, rows: int, tokens: int, put: Kind, first: bool) -> tuple[float, float]:
    """Seconds of `tokens` decode steps without and with steering, in turn."""
    ready, seconds = {}, {False: 0.0, True: 0.0}
    for steered in (first, not first):
        with put(policy, rows) if steered else nullcontext():
            ready[steered] = decoder(policy, rows, tokens, variants=steered)
    for step in range(tokens):
        for steered in (first, not first) if step % 2 else (not first, first):
            on = put(policy, rows)
            if not steered:
                on.remove()
            start = time.perf_counter()
            ready[steered].step()
            seconds[steered] += time.perf_counter() - start
            on.remove()
    return seconds[False], seconds[True]


def operations(policy: Policy, rows: int, put: Kind | None) -> Counter[str]:
    """Kinds of operations in the graph of one decode step, and how many of each."""
    with put(policy, rows) if put else nullcontext(), tempfile.NamedTemporaryFile(suffix=".dot") as file:
        ready = decoder(policy, rows, 1, variants=put is not None)
        ready.board.begin()
        for cache in ready.caches:
            cache.reserve()
        mx.export_to_dot(file.name, policy.body.hidden(mx.ones((rows, 1), mx.int32), ready.caches))
        return Counter(re.findall(r'label ="(\w+)", shape=rectangle', Path(file.name).read_text()))


def compare(policy: Policy, rows: int, tokens: int, put: Kind, pairs: int) -> dict[str, Any]:
    """Tokens per second of both, and the cost with its interval."""
    pair(policy, rows, tokens, put, first=True)
    seconds = [pair(policy, rows, tokens, put, first=number % 2 == 0) for number in range(pairs)]
    costs = [1 - base / steered for base, steered in seconds]
    mean = statistics.mean(costs)
    near = min(T_95, key=lambda freedom: abs(freedom - (pairs - 1)))
    half = T_95[near] * statistics.stdev(costs) / math.sqrt(pairs)
    rates = [rows * tokens / statistics.median(each) for each in zip(*seconds, strict=True)]
    return {
        **{f"{name}_tokens_per_second": round(r, 2) for name, r in zip(("base", "steered"), rates, strict=True)},
        **{"cost": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)},
        "median_cost": round(statistics.median(costs), 5),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat", help="folder of SmolLM2, see smollm2.py, or another model")
    parser.add_argument("--batch", default="1,8", help="rows decoded together, comma-separated")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24, help="decode steps of a run")
    parser.add_argument("--steer", default="add-1,add-all", help="comma-separated; `all` for every kind")
    a = parser.parse_args()
    blas.set_threads()
    policy = Policy.load(a.model)
    blocks = list(range(len(taps.blocks(policy.model))))
    width = policy.body.hidden(mx.array([[0]])).shape[-1]
    rng = np.random.default_rng(0)
    direction = Direction({block: 1e-3 * rng.normal(size=width) for block in blocks})
    ways = kinds(direction, blocks)
    asked = list(ways) if a.steer == "all" else a.steer.split(",")
    if unknown := [name for name in asked if name not in ways]:
        parser.error(f"no kind {unknown[0]}; there are {', '.join(ways)}")
    found: list[dict[str, Any]] = []
    head = ("rows", "steering", "tokens/s base", "steered", "cost", "95% interval", "ops per steered block")
    lines: list[tuple[str, ...]] = [head]
    for rows in map(int, a.batch.split(",")):
        bare = operations(policy, rows, None)
        for name in asked:
            added = operations(policy, rows, ways[name]) - bare
            acting = len(blocks) if name.endswith("-all") else 1
            row = {"rows": rows, "steering": name, "operations": dict(added), "blocks": acting}
            row |= {"operations_per_block": round(added.total() / acting, 2)}
            row |= compare(policy, rows, a.tokens, ways[name], a.pairs)
            found.append(row)
            rates = f"{row['base_tokens_per_second']:.1f}", f"{row['steered_tokens_per_second']:.1f}"
            cost = f"{row['cost']:.2%}", f"{row['low']:.2%} to {row['high']:.2%}"
            lines.append((str(rows), name, *rates, *cost, f"{row['operations_per_block']:g}"))
            print(launch.table([head, lines[-1]]), flush=True)
    print(f"\n{launch.table(lines)}")
    versions = {package: version(package) for package in ("mlx-realign", "mlx", "mlx-lm")}
    print(json.dumps({"machine": launch.machine(), "versions": versions, "model": a.model, "rows": found}))


if __name__ == "__main__":
    main()
