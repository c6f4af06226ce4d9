# SPDX-License-Identifier: Apache-2.0
"""What the drivers share: their flags, and the JSON object each prints as its last line. Standard library only."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    """The job, in flags that are the same for every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=("sft", "dpo", "orpo", "cpo"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL: prompt/completion or prompt/chosen/rejected")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precompute", action="store_true", help="reference log-probs before the first step")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="one more setting of the peer"
    )
    return parser.parse_args()


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
