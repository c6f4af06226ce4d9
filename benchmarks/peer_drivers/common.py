# SPDX-License-Identifier: Apache-2.0
"""What the drivers share: their flags, and the JSON object each prints as its last line. Standard library only."""

import argparse
import functools
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reward


def arguments() -> argparse.Namespace:
    """The job, in flags that are the same for every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=("sft", "dpo", "orpo", "cpo", "grpo"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL: prompt, prompt/completion or pairs")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precompute", action="store_true", help="reference log-probs before the first step")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--group-size", type=int, default=8, help="grpo: completions of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="grpo: most tokens of a completion")
    parser.add_argument("--rows", type=int, help="grpo: completions in one backward pass; default: all of a step")
    parser.add_argument("--dtype", default="float32", help="of peers that choose one; auto: the model's own")
    parser.add_argument("--limit", type=float, help="seconds after which it reports what it did and ends")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="one more setting of the peer"
    )
    return parser.parse_args()


def bind_fast_blas() -> None:
    """Give the peer's MLX the BLAS that mlx-realign uses ($BENCHMARK_BLAS, its file): with MLX's own, which computes 2
    GFLOP/s on Linux, it would lose for the wrong reason. No file of the peer is changed."""
    if path := os.environ.get("BENCHMARK_BLAS"):
        spec = importlib.util.spec_from_file_location("elf", Path(__file__).parents[2] / "mlx_realign/elf.py")
        assert spec and spec.loader
        elf = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(elf)
        elf.bind(path)


def settings(pairs: list[str]) -> dict[str, Any]:
    """FIELD=VALUE words as a dict; values are JSON where they parse as such, else text."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def conversational(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Strings as messages, for peers that use the chat template on messages only."""
    return {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in row.items()}


def grpo_fields(a: argparse.Namespace) -> dict[str, Any]:
    """GRPO under the names that TRL gave its settings: one update on each rollout, no reference, temperature 1."""
    completions = a.batch * a.group_size
    at_once = a.rows or completions
    return {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": completions // at_once,
        "num_generations": a.group_size,
        "max_completion_length": a.max_new_tokens,
        "loss_type": "grpo",
        "beta": 0.0,
        "temperature": 1.0,
    }


def counting_reward(tokens: list[int]) -> Callable[..., list[float]]:
    """The reward as TRL calls one; each call adds the number of tokens of its completions to the list."""

    def letter_share(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [reward.verify(turns[0]["content"]) for turns in completions]

    return letter_share


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, each call of which adds its seconds to the list."""

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **named)
        seconds.append(round(time.perf_counter() - start, 4))
        return result

    return call


def limit(seconds: float | None, finish: Callable[[], None]) -> None:
    """After so many seconds, wherever the peer is then: say what it did until now and end the process."""

    def stop() -> None:
        finish()
        os._exit(0)

    if seconds:
        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()


class Clock:
    """Marks the start of the first step and the end of every step; a step lasts from the mark before it."""

    def __init__(self, synchronize: Callable[[], Any] = lambda: None):
        self.created, self.marks, self.synchronize = time.perf_counter(), [], synchronize

    def begin(self) -> None:
        """Call at the start of a step; only the first call counts."""
        if not self.marks:
            self.marks.append(time.perf_counter())

    def end(self) -> None:
        """Call at the end of a step, with its work submitted."""
        self.synchronize()
        self.marks.append(time.perf_counter())


def report(*, steps_s: list[float], losses: list[float], mlx_peak_gb: float | None, **notes: Any) -> None:
    """Print the result as one JSON line."""
    print()
    print(json.dumps({"steps_s": steps_s, "losses": losses, "mlx_peak_gb": mlx_peak_gb, "notes": notes}), flush=True)


def seconds(clock: Clock) -> list[float]:
    """Seconds of each step."""
    return [round(b - a, 4) for a, b in zip(clock.marks, clock.marks[1:], strict=False)]


bind_fast_blas()
