# SPDX-License-Identifier: Apache-2.0
"""Time rollouts of mlx-realign against mlx_lm.batch_generate, in turn, in one process, on the same prompts.

    python benchmarks/make_prompts.py MODEL FOLDER
    python benchmarks/rollouts.py --data FOLDER [--rounds 3]

4 prompts, 8 completions of each, 64 tokens, temperature 1, float32, on a model that never ends a completion: prompts of
four lengths (`mixed`), and of 200 tokens (`long`). Ours starts from a policy with a fresh adapter of rank 8 on all
linear layers, as training does, and from the bare model; it keeps the log-prob of every token as well. batch_generate
gets each prompt eight times (the form it takes), the bare model, and a prefill of 8 prompts at a time, its default, and
of all 32. Tokens per second are tokens generated over seconds from the call to its result, prompts included: medians
over rounds, one untimed round before. GB (1e9 bytes) are MLX's peak above what was held before the call.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import launch
import mlx.core as mx
import mlx_lm
import workload
from grpo import COMPLETIONS, GROUP, TOKENS
from mlx_lm.sample_utils import make_sampler

from mlx_realign import blas, data
from mlx_realign.config import TrainSettings
from mlx_realign.policy import Policy
from mlx_realign.rollout import Sampling, rollout

Call = Callable[[list[list[int]], int], int]  # prompts and a seed -> tokens generated
OURS, THEIRS = "mlx-realign", "batch_generate"
SETS = ("mixed", "long")


def contestants(model: str, tokens: int) -> tuple[dict[str, Call], Any]:
    """Name -> what is timed, and the tokenizer."""
    bare, adapted = Policy.load(model), Policy.load(model)
    adapted.prepare(TrainSettings(lora_rank=workload.RANK, lora_alpha=workload.ALPHA))
    theirs, tokenizer = mlx_lm.load(model)[:2]
    theirs.set_dtype(bare.dtype)
    theirs.eval()

    def ours(policy: Policy) -> Call:
        def call(prompts: list[list[int]], seed: int) -> int:
            groups = rollout(policy, prompts, Sampling(max_new_tokens=tokens), group_size=GROUP, seed=seed)
            return sum(len(one.tokens) for group in groups for one in group)

        return call

    def batch_generate(prefill: int) -> Call:
        def call(prompts: list[list[int]], seed: int) -> int:
            mx.random.seed(seed)
            each = [prompt for prompt in prompts for _ in range(GROUP)]
            options = {"sampler": make_sampler(1.0), "prefill_batch_size": prefill}
            response = mlx_lm.batch_generate(
                theirs, tokenizer, each, max_tokens=tokens, return_token_ids=True, **options
            )
            return sum(len(ids) for ids in response.token_ids or [])

        return call

    return {
        f"{OURS}, adapter": ours(adapted),
        f"{THEIRS}, prefill 8": batch_generate(8),
        f"{OURS}, bare model": ours(bare),
        f"{THEIRS}, prefill {COMPLETIONS}": batch_generate(COMPLETIONS),
    }, tokenizer


def measure(call: Call, prompts: list[list[int]], seed: int) -> dict[str, float]:
    """Seconds, tokens and memory of one call."""
    blas.set_threads()
    mx.clear_cache()
    mx.reset_peak_memory()
    held, start = mx.get_active_memory(), time.perf_counter()
    count = call(prompts, seed)
    took = time.perf_counter() - start
    return {"seconds": took, "tokens": count, "extra_gb": (mx.get_peak_memory() - held) / 1e9}


def compare(calls: dict[str, Call], prompts: list[list[int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Name -> medians over rounds, in each of which every contestant is called once, in order."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for seed in range(rounds + 1):
        for name, call in calls.items():
            found[name].append(measure(call, prompts, seed))
            print(f"{name}: {found[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return {name: medians(runs[1:]) for name, runs in found.items()}


def medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Several calls of the same contestant as numbers."""
    return {
        "seconds": round(statistics.median(r["seconds"] for r in runs), 3),
        "tokens": round(statistics.median(r["tokens"] for r in runs)),
        "tokens_per_second": round(statistics.median(r["tokens"] / r["seconds"] for r in runs), 1),
        "extra_gb": round(statistics.median(r["extra_gb"] for r in runs), 3),
        "all_seconds": [round(r["seconds"], 3) for r in runs],
    }


def shown(about: str, found: dict[str, dict[str, Any]]) -> str:
    """The table of one set of prompts; the last column divides by the faster way of batch_generate."""
    best = max(row["tokens_per_second"] for label, row in found.items() if label.startswith(THEIRS))
    lines: list[tuple[str, ...]] = [("", "seconds", "tokens", "tokens/s", "extra GB", "tokens/s : theirs")]
    for label, row in found.items():
        numbers = (f"{row['seconds']:.2f}", str(row["tokens"]), f"{row['tokens_per_second']:.1f}")
        lines.append((label, *numbers, f"{row['extra_gb']:.2f}", f"{row['tokens_per_second'] / best:.2f}"))
    return f"\n{about}\n{launch.table(lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by make_prompts.py")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated: " + ", ".join(SETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a completion")
    a = parser.parse_args()
    if unknown := [name for name in a.sets.split(",") if name not in SETS]:
        parser.error(f"no set {unknown[0]}; there are {', '.join(SETS)}")
    calls, tokenizer = contestants(str(a.data / "model"), a.tokens)
    results = {}
    for name in a.sets.split(","):
        texts = [json.loads(line)["prompt"] for line in (a.data / f"{name}.jsonl").read_text().splitlines()]
        prompts = [data.encode_prompt(text, tokenizer) for text in texts]
        results[name] = compare(calls, prompts, a.rounds)
        lengths = ", ".join(map(str, sorted({len(prompt) for prompt in prompts})))
        about = f"{name}: {len(prompts)} prompts of {lengths} tokens x {GROUP} completions x {a.tokens} tokens"
        print(shown(about, results[name]), flush=True)
    model = json.loads((a.data / "lengths.json").read_text())["model"]
    versions = {package: version(package) for package in ("mlx-realign", "mlx", "mlx-lm")}
    head = {"machine": launch.machine(), "versions": versions, "model": model, "rounds": a.rounds}
    print(json.dumps({**head, "sets": results}))


if __name__ == "__main__":
    main()
