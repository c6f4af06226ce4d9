# SPDX-License-Identifier: Apache-2.0
"""Rows made by a program, whose answers are known: tasks of reasoning_gym, or plain sums without any library.

Each row has `prompt` and `answer`, and under `entry` the task's own item, by which its verifier judges.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import flags
from ..errors import UserError
from ..files import new_file, write_rows
from .problems import text_key

INSTRUCTION = "Write the final answer between <answer> and </answer>."
_CHECKED = 20  # entries whose verdict is compared before and after JSON
_OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_SUMS: dict[str, Any] = {"min": 0, "max": 99, "operators": "+"}


@dataclass(frozen=True)
class MakeSettings:
    """What `data make` can be told."""

    task: str
    """reasoning_gym:NAME (chain_sum, say), or sums: two numbers, without any library."""
    output: str
    """The JSONL file to write; it must not exist yet."""
    rows: int = 500
    """How many rows, each with another question; -n is the same."""
    seed: int = 0
    """The same seed gives the same rows."""
    config: tuple[str, ...] = ()
    """Settings of the task, key=value with commas between; of sums: min, max (0, 99) and operators (of + - *)."""
    ask: Literal["suffix", "system", "none"] = "suffix"
    """Where the answer is asked for in <answer></answer>: below the question, in a system prompt, or nowhere."""
    json: bool = False
    """One JSON object on standard output."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"--rows must be at least 1, got {self.rows}")


def make(settings: MakeSettings) -> dict[str, Any]:
    """Write the rows. Returns written, task, output; UserError where the task cannot give so many."""
    library, _, name = settings.task.partition(":")
    config = _config(settings.config)
    if library == "reasoning_gym" and name:
        with redirect_stdout(sys.stderr):  # some tasks print
            items = _reasoning_gym(name, settings, config)
    elif settings.task == "sums":
        items = _sums(settings, config)
    else:
        raise UserError(f"--task {settings.task}: expected sums, or a task like reasoning_gym:chain_sum")
    rows = [_row(item, settings) for item in items]
    output = Path(settings.output).expanduser()
    with new_file(output) as file:
        write_rows(file, rows)
    return {"written": len(rows), "task": settings.task, "output": str(output)}


def _row(item: dict[str, Any], settings: MakeSettings) -> dict[str, Any]:
    question = item["question"]
    prompt = f"{question}\n\n{INSTRUCTION}" if settings.ask == "suffix" else question
    system = {"system": INSTRUCTION} if settings.ask == "system" else {}
    return {"prompt": prompt, **system, "answer": item["answer"], "task": settings.task, "entry": item}


def _config(words: Iterable[str]) -> dict[str, Any]:
    """key=value -> value as JSON, else as text. A piece without = belongs to the value before it: [1,2] has a comma."""
    joined: list[str] = []
    for word in words:
        if "=" not in word and joined:
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    found = {}
    for word in joined:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--config {word}: expected key=value")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found


# Sums. -------------------------------------------------------------------------------------------------------------


def _sums(settings: MakeSettings, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Questions drawn without repetition from all pairs of numbers."""
    if unknown := [key for key in config if key not in _SUMS]:
        raise UserError(f"--config {unknown[0]}: sums has {', '.join(_SUMS)}.{flags.nearest(unknown[0], _SUMS)}")
    least, most, operators = ({**_SUMS, **config}[key] for key in _SUMS)
    for key, value in (("min", least), ("max", most)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"--config {key}={value}: expected a whole number")
    if not isinstance(operators, str) or not operators or set(operators) - set(_OPERATORS):
        raise UserError(f"--config operators={operators}: expected some of {' '.join(_OPERATORS)}, +- for instance")
    numbers, operators = most - least + 1, "".join(dict.fromkeys(operators))
    total = max(numbers, 0) ** 2 * len(operators)
    if total < settings.rows:
        raise UserError(f"--rows {settings.rows}: there are {total} sums of {least} to {most}; widen min and max")
    items = []
    for place in random.Random(settings.seed).sample(range(total), settings.rows):
        place, which = divmod(place, len(operators))
        a, b, sign = least + place // numbers, least + place % numbers, operators[which]
        facts = {"source_dataset": "sums", "a": a, "b": b, "operator": sign}
        answer = str(_OPERATORS[sign](a, b))
        items.append({"question": f"What is {a} {sign} {b}?", "answer": answer, "metadata": facts})
    return items


# reasoning_gym. ----------------------------------------------------------------------------------------------------


def _reasoning_gym(name: str, settings: MakeSettings, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Items of one of its tasks, each question once."""
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"--task {settings.task} needs reasoning_gym, which an extra brings: pip install 'mlx-realign[verifiers]'"
        ) from None
    if name not in DATASETS:
        hint = flags.nearest(name, DATASETS)
        raise UserError(f"--task {settings.task}: reasoning_gym has no task {name!r}.{hint}.")

    def items(size: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        try:
            dataset = reasoning_gym.create_dataset(name, **{"seed": settings.seed, **config, "size": size})
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"--task {settings.task} --config: {_one_line(error)}") from error
        for i in range(size):
            yield dataset, dataset[i]

    found: dict[bytes, dict[str, Any]] = {}
    for size in (settings.rows, 4 * settings.rows):  # a small task repeats itself, so more are drawn than asked for
        for dataset, item in items(size):
            kept = json.loads(json.dumps(item, default=_plain))
            key = text_key(item["question"])
            if key not in found and len(found) < _CHECKED:
                _survives(dataset, item, kept, settings.task)
            found.setdefault(key, kept)
            if len(found) == settings.rows:
                return list(found.values())
    raise UserError(
        f"--rows {settings.rows}: --task {settings.task} gave {len(found)} different questions in {4 * settings.rows}: "
        "ask for fewer, or widen it with --config"
    )


def _survives(dataset: Any, item: dict[str, Any], kept: dict[str, Any], task: str) -> None:
    """UserError where the task's own verdict on its answer is another one once the item has been JSON."""
    try:
        before = dataset.score_answer(answer=item["answer"], entry=item)
    except Exception:  # a task that cannot judge its own answer: nothing to compare
        return
    try:
        after = dataset.score_answer(answer=kept["answer"], entry=kept)
    except Exception as error:
        raise UserError(f"--task {task}: its items cannot be judged from a file: {_one_line(error)}") from error
    if before != after:
        raise UserError(f"--task {task}: its items cannot be judged from a file: score {before} becomes {after}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(value: Any) -> Any:
    """What JSON has no word for: numbers and arrays of numpy as Python's own, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
