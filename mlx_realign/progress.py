# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: a bar on a terminal, plain lines elsewhere, JSON lines for machines."""

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from . import streams
from .runfolder import as_json
from .terminal import Console

SHOWN = {"loss": "loss", "eval_loss": "eval_loss", "kl": "KL"}  # metric -> its name on the line
SHOWN |= {"reward": "reward", "eval_reward": "eval_reward"}
SHOWN_WIDE = SHOWN | {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "mean_token_accuracy": "top-1"}
SHOWN_WIDE |= {f"eval_{name}": short for name, short in SHOWN_WIDE.items() if name not in SHOWN}
WIDE_COLUMNS = 120
LASTING = ("kl",)  # not measured at every step: the line keeps the last one
PLAIN_EVERY_S = 10.0


class Reporter:
    """Use as a context manager: `say` for sentences, `row` for metrics, `facts` for a table, `fail` for the end."""

    def __init__(self, *, as_json: bool = False, file: TextIO | None = None) -> None:
        self.file = streams.lasting(file or sys.stdout)
        self.as_json = as_json
        self.console = Console(file=self.file, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.last = self.began = time.monotonic()
        self.first = self.steps = 0
        self.note = "first step"
        self.lasting: dict[str, Any] = {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """The loop is over: the bar stays as it is."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def waiting(self, text: str) -> AbstractContextManager[Any]:
        """A spinner on a terminal while nothing can be counted yet."""
        shown = self.console.is_terminal and not self.as_json
        return self.console.status(text) if shown else nullcontext()

    def start(self, step: int, steps: int) -> None:
        """The loop begins after `step` of `steps`."""
        self.first, self.steps, self.began, self.last = step, steps, time.monotonic(), 0.0
        if self.console.is_terminal and not self.as_json:
            count, note = MofNCompleteColumn(table_column=Column(no_wrap=True)), Column(no_wrap=True)
            columns = (count, BarColumn(bar_width=None), TextColumn("{task.fields[note]}", table_column=note))
            self.bar = Progress(*columns, console=self.console, expand=True)
            self.task = self.bar.add_task("step", total=steps, completed=step, note=self.note)
            self.bar.start()

    def say(self, text: str) -> None:
        """One sentence, above the bar."""
        if self.as_json:
            self._write(json.dumps({"message": text}))
        else:
            self.console.print(text, markup=False)

    def fail(self, text: str) -> None:
        """Why the run ends early; on standard error, where it is not JSON."""
        self.stop()
        if self.as_json:
            self._write(json.dumps({"error": text}))
        else:
            print(text, file=streams.lasting(sys.stderr))

    def facts(self, facts: dict[str, Any]) -> None:
        """What a dry run found: a line each, or one JSON object."""
        if self.as_json:
            self._write(json.dumps(facts))
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            nested = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else [_plain(value)]
            for i, line in enumerate(nested):
                self.say(f"{'' if i else name.replace('_', ' '):<{width}}  {line}")

    def row(self, row: dict[str, Any]) -> None:
        """Metrics of one optimizer step, or of one evaluation (keys start with eval_)."""
        now, of_step = time.monotonic(), "loss" in row
        self.lasting |= {name: row[name] for name in LASTING if name in row}
        told = self.lasting | row if of_step else row
        if self.as_json:
            self._write(as_json(row))
        elif self.bar and of_step:
            shown = SHOWN_WIDE if self.console.width >= WIDE_COLUMNS else SHOWN
            self.note = _note(told, shown, self._left(row["step"]))
            self.bar.update(self.task, completed=row["step"], note=self.note)
        elif self.bar or not of_step or row["step"] in (self.first + 1, self.steps) or now - self.last > PLAIN_EVERY_S:
            self.last = now
            left = self._left(row["step"]) if of_step else ""
            self.say(f"step {row['step']}/{self.steps}  {_note(told, SHOWN_WIDE, left)}")

    def busy(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of something between steps, which may take minutes."""
        if self.bar:
            self.bar.update(self.task, note=f"{what} {done}/{total}" if done < total else self.note)
        elif not self.as_json and time.monotonic() - self.last > PLAIN_EVERY_S:
            self.last = time.monotonic()
            self.say(f"{what} {done}/{total}")

    def _left(self, step: int) -> str:
        """Time to the last step at the pace so far, evaluations and checkpoints included."""
        seconds = (time.monotonic() - self.began) / max(1, step - self.first) * (self.steps - step)
        return f"ETA {duration(seconds)}" if step < self.steps else f"took {duration(time.monotonic() - self.began)}"

    def _write(self, line: str) -> None:
        print(line, file=self.file, flush=True)


def duration(seconds: float) -> str:
    """5400.2 -> 1:30:00, 90 -> 1:30."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _note(row: dict[str, Any], shown: dict[str, str], left: str) -> str:
    parts = [f"{short} {row[name]:.4g}" for name, short in shown.items() if name in row]
    if "tokens_per_second" in row:
        parts += [f"{row['tokens_per_second']:.0f} tokens/s", left, f"{row['peak_memory_gb']:.2f} GB"]
    return "  ".join(filter(None, parts))
