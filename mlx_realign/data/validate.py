# SPDX-License-Identifier: Apache-2.0
"""A file before it is trained on: what is wrong with which row, how long rows are, what exceeds which limit."""

from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainSettings
from ..errors import UserError
from . import source as sources
from .encode import Encoder
from .formats import Row, accepted, as_messages
from .gates import Gates, GateSettings
from .pipeline import Problems, chunks, examples, notes

PERCENTILES = (50, 90, 99, 100)
MAX_CHARS = {"system": 1_000, "user": 10_000, "assistant": 32_768}  # beyond these a text is more likely a mistake
MIN_GAP = 0.15  # metadata.gap_score below this: the pair hardly says which is better (0-1 scale)


def validate(
    path: str | Path | sources.Rows,
    format: str,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    chat_template: bool = True,
    split: str = "train",
    gates: GateSettings | None = None,
) -> dict[str, Any]:
    """Judge a file. Lengths are in tokens of `tokenizer`, in characters without one.

    Returns rows, bad [{line, reason}], warnings [{line, reason}], lengths {unit, prompt, completion, total: {p50 ...}},
    over_max_length {rows, share, completion_alone, max_length} (None without tokenizer or max_length), notes, and gates
    (what `Gates.verdicts` returns; empty where none are asked for).
    UserError where there is no file, no row, or messages meet a tokenizer without a template.
    """
    source = sources.resolve(path, split)
    settings = TrainSettings(chat_template=chat_template, skip_bad_rows=True)
    problems = Problems(str(source) if isinstance(source, Path) else "rows", format, settings, shown=None)
    encoder = tokenizer and Encoder(tokenizer, chat_template=chat_template, max_length=None, truncate="error")
    sizes: dict[str, array] = {name: array("q") for name in ("prompt", "completion", "total")}
    warnings: list[dict[str, Any]] = []
    unit, meter = "tokens" if encoder else "characters", None
    if gates and gates.gate != "off":
        meter = Gates(gates, format, unit=unit, max_length=max_length if encoder else None)
    for chunk in chunks(source, format, problems):
        for line, row in chunk:
            warnings += [{"line": line, "reason": reason} for reason in doubts(row)]
        for line, row, prompt, completions in _measure(chunk, encoder, problems):
            sizes["prompt"].append(prompt)
            sizes["completion"].append(max(completions))
            sizes["total"].append(prompt + max(completions))
            if meter:
                meter.add(line, row, prompt, completions)
    if not problems.read:
        raise UserError(f"{problems.name}: the file is empty. {format} data has rows {accepted(format)}")
    counts = encoder.counts if encoder else Counter()
    return {
        "file": problems.name,
        "format": format,
        "rows": problems.read,
        "good": len(sizes["total"]),
        "bad": [{"line": line, "reason": reason} for line, reason in sorted(problems.bad)],
        "warnings": warnings,
        "lengths": {"unit": unit, **{n: _percentiles(s) for n, s in sizes.items()}},
        "over_max_length": _over(sizes, max_length) if encoder and max_length else None,
        "counts": {key: int(value) for key, value in sorted(counts.items()) if value},
        "notes": notes(encoder, None) if encoder else [],
        "gates": meter.verdicts(problems.bad) if meter else [],
    }


def _measure(
    chunk: list[tuple[int, Row]], encoder: Encoder | None, problems: Problems
) -> Iterator[tuple[int, Row, int, list[int]]]:
    """(line, row, length of its prompt, lengths of its completions) of each good example."""
    if encoder is None:
        for line, row in chunk:
            prompt, completions = as_messages(row)
            yield line, row, 0 if row.text else _chars(prompt), [_chars(c) for c in completions]
        return
    rows = dict(chunk)
    for example in examples(chunk, encoder, problems):
        yield example.line, rows[example.line], len(example.prompt), [len(c.tokens) for c in example.completions]


def doubts(row: Row) -> Iterator[str]:
    """What is allowed but is more often a mistake than meant."""
    if row.text:
        return
    prompt, completions = as_messages(row)
    longest: Counter = Counter()
    for message in [*prompt, *(m for c in completions for m in c)]:
        longest[message["role"]] = max(longest[message["role"]], len(message.get("content") or ""))
    for role, limit in MAX_CHARS.items():
        if longest[role] > limit:
            yield f"a {role} text of {longest[role]} characters (more than {limit})"
    gap = row.metadata.get("gap_score")
    if isinstance(gap, int | float) and gap < MIN_GAP:
        yield f"metadata.gap_score {gap} is below {MIN_GAP}: the pair hardly says which completion is better"


def _chars(messages: list[dict[str, Any]]) -> int:
    return sum(len(m.get("content") or "") for m in messages)


def _percentiles(values: array) -> dict[str, int]:
    if not values:
        return {}
    found = np.percentile(np.frombuffer(values, np.int64), PERCENTILES, method="higher")
    return {("max" if p == 100 else f"p{p}"): int(v) for p, v in zip(PERCENTILES, found, strict=True)}


def _over(sizes: dict[str, array], max_length: int) -> dict[str, Any]:
    total, completion = (
        np.frombuffer(sizes[n], np.int64) if sizes[n] else np.zeros(0) for n in ("total", "completion")
    )
    rows = int((total > max_length).sum())
    return {
        "max_length": max_length,
        "rows": rows,
        "share": rows / max(len(total), 1),
        "completion_alone": int((completion >= max_length).sum()),  # --truncate left has to drop these
    }
