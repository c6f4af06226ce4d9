# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: a bar on a terminal, plain lines elsewhere, JSON lines for machines."""

import json
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "mean_token_accuracy", "eval_loss")
PLAIN_EVERY_S = 10.0


class Reporter:
    """Use as a context manager; `say` for sentences, `row` for metrics of a step."""

    def __init__(self, *, as_json: bool = False, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self.as_json = as_json
        self.console = Console(file=self.file, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.last = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def start(self, step: int, steps: int) -> None:
        """The loop begins after `step` of `steps`."""
        self.steps = steps
        if self.console.is_terminal and not self.as_json:
            columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
            self.bar = Progress(TextColumn("step"), *columns, TextColumn("{task.fields[note]}"), console=self.console)
            self.task = self.bar.add_task("step", total=steps, completed=step, note="")
            self.bar.start()

    def say(self, text: str) -> None:
        """One sentence, above the bar."""
        if self.as_json:
            self._write({"message": text})
        else:
            self.console.print(text, markup=False)

    def row(self, row: dict[str, Any]) -> None:
        """Metrics of one optimizer step, or of one evaluation (keys start with eval_)."""
        if self.as_json:
            self._write(row)
        elif self.bar:
            if "loss" in row:
                self.bar.update(self.task, completed=row["step"], note=_note(row))
            else:
                self.say(f"step {row['step']}  {_note(row)}")
        elif "loss" not in row or row["step"] in (1, self.steps) or time.monotonic() - self.last > PLAIN_EVERY_S:
            self.last = time.monotonic()
            self.say(f"step {row['step']}/{self.steps}  {_note(row)}")

    def _write(self, value: dict[str, Any]) -> None:
        print(json.dumps(value), file=self.file, flush=True)


def _note(row: dict[str, Any]) -> str:
    parts = [f"{name} {row[name]:.4g}" for name in SHOWN if name in row]
    if "tokens_per_second" in row:
        parts += [f"{row['tokens_per_second']:.0f} tokens/s", f"{row['peak_memory_gb']:.2f} GB"]
    return "  ".join(parts)
