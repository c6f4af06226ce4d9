# SPDX-License-Identifier: Apache-2.0
"""A file before it is trained on: what is wrong with which row, how long rows are, what exceeds which limit."""

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TrainSettings
from ..errors import UserError
from ..reach import Reach
from . import source as sources
from .encode import Encoder
from .formats import Row, accepted, as_messages
from .gates import Gates, GateSettings
from .group_gates import GroupLimits
from .judge import FlagCheck
from .messages import RowError
from .pipeline import Problems, chunks, examples, notes

PERCENTILES = (50, 90, 99, 100)
MAX_CHARS = {"system": 1_000, "user": 10_000, "assistant": 32_768}  # beyond these a text is more likely a mistake
MIN_GAP = 0.15  # metadata.gap_score below this: the pair hardly says which is better (0-1 scale)


@dataclass(frozen=True)
class GroupChecks:
    """What `validate` asks of rows of groups beside their form."""

    limits: GroupLimits = GroupLimits()
    score_min: float | None = None  # scored groups with a score below it are bad rows
    score_max: float | None = None
    verifier: str | None = None  # as --verifier takes them; compared with `correct` flags

    def flags(self, format: str) -> AbstractContextManager[FlagCheck | None]:
        """The verifier at work, or None. UserError where the format has no use for these checks."""
        asked = [name for name in ("score_min", "score_max", "verifier") if getattr(self, name) is not None]
        if asked and format != "groups":
            raise UserError(f"--{asked[0].replace('_', '-')} is about groups, and this is {format} data: drop it")
        return FlagCheck(self.verifier) if self.verifier else nullcontext()

    def kept(
        self,
        chunk: list[tuple[int, Row]],
        flags: FlagCheck | None,
        problems: Problems,
        warnings: list[dict[str, Any]],
    ) -> list[tuple[int, Row]]:
        """The rows of a chunk that pass; the `correct` flags of those that the verifier can judge are compared.

        What it cannot judge is bad where the responses are yet to come, and a warning where the row has flags.
        """
        complaints = flags.complaints(chunk) if flags else {}
        kept = []
        for line, row in chunk:
            reason = self._beyond(row)
            if line in complaints and row.group == "open":
                reason = reason or complaints[line]
            elif line in complaints and row.group == "verified":
                warnings.append({"line": line, "reason": complaints[line]})
            if reason:
                problems.add(line, RowError(reason))
            else:
                kept.append((line, row))
        if flags:
            flags.add([(line, row) for line, row in kept if line not in complaints])
        return kept

    def _beyond(self, row: Row) -> str | None:
        least, most = self.score_min, self.score_max
        for score in row.extras.get("scores", []) if row.group == "scored" else []:
            if least is not None and score < least:
                return f"a score of {score:g} is below --score-min {least:g}"
            if most is not None and score > most:
                return f"a score of {score:g} is above --score-max {most:g}"
        return None


def validate(
    path: str | Path | sources.Rows,
    format: str,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    chat_template: bool = True,
    split: str = "train",
    gates: GateSettings | None = None,
    groups: GroupChecks | None = None,
    reach: Reach | None = None,
) -> dict[str, Any]:
    """Judge a file. Lengths are in tokens of `tokenizer`, in characters without one.

    Returns rows, bad [{line, reason}], warnings [{line, reason}], lengths {unit, prompt, completion, total: {p50 ...}},
    over_max_length {rows, share, completion_alone, max_length} (None without tokenizer or max_length), notes, and gates
    (what `Gates.verdicts` returns; empty where none are asked for). groups: what is asked of groups beside that.
    reach: limits of the model (`Policy.reach`, `reach.of_config`); a row beyond them is bad.
    UserError where there is no file, no row, or messages meet a tokenizer without a template.
    """
    source = sources.resolve(path, split)
    settings = TrainSettings(chat_template=chat_template, skip_bad_rows=True)
    problems = Problems(str(source) if isinstance(source, Path) else "rows", format, settings, shown=None)
    limits = {"max_length": None, "truncate": "error", "reach": reach}
    encoder = tokenizer and Encoder(tokenizer, chat_template=chat_template, **limits)
    sizes: dict[str, array] = {name: array("q") for name in ("prompt", "completion", "total")}
    warnings: list[dict[str, Any]] = []
    unit, meter = "tokens" if encoder else "characters", None
    groups = groups or GroupChecks()
    if gates and gates.gate != "off":
        meter = Gates(gates, format, unit=unit, max_length=max_length if encoder else None, groups=groups.limits)
    with groups.flags(format) as flags:
        for chunk in chunks(source, format, problems):
            chunk = groups.kept(chunk, flags, problems, warnings)
            for line, row in chunk:
                warnings += [{"line": line, "reason": reason} for reason in doubts(row)]
            for line, row, prompt, completions in _measure(chunk, encoder, problems):
                longest = max(completions, default=0)
                for name, size in (("prompt", prompt), ("completion", longest), ("total", prompt + longest)):
                    sizes[name].append(size)
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
        "warnings": sorted(warnings, key=lambda warning: warning["line"]),
        "lengths": {"unit": unit, **{n: _percentiles(s) for n, s in sizes.items()}},
        "over_max_length": _over(sizes, max_length) if encoder and max_length else None,
        "counts": {key: int(value) for key, value in sorted(counts.items()) if value},
        "notes": notes(encoder, None) if encoder else [],
        "gates": [*(meter.verdicts(problems.bad) if meter else []), *([flags.verdict(groups.limits)] if flags else [])],
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
        row = rows[example.line]._replace(extras=example.extras)  # a group may have lost responses that are the same
        yield example.line, row, len(example.prompt), [len(c.tokens) for c in example.completions]


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
