# SPDX-License-Identifier: Apache-2.0
"""How hard problems are for whoever wrote their responses: the pass rate of each, and rows chosen by it.

The rate is smoothed, (right + 1) / (responses + 2), the mean of what a uniform prior leaves: four wrong answers of four
are 0.17 and not 0. Rows that ask the same share one rate; a response that comes twice counts twice.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..files import new_file, write_rows
from . import source as sources
from .formats import parse
from .group_gates import rate_shares, told
from .groups import Response, read_responses
from .judge import FlagCheck
from .messages import RowError
from .problems import problem_key
from .split import refuse

_ROWS = 64  # judged at a time


@dataclass(frozen=True)
class DifficultySettings:
    """What `data difficulty` can be told."""

    file: str
    """JSONL file of groups, folder with train/valid/test.jsonl, or hub dataset id."""
    output: str | None = None
    """The JSONL file to write: the rows with their pass_rate; it must not exist yet. Without it nothing is written."""
    verifier: str | None = None
    """Judge the responses anew by these verifiers; where none can say, the row's own flag stays."""
    threshold: float | None = None
    """Of scored groups: a score of at least this is right."""
    min_pass_rate: float | None = None
    """Leave out problems that are harder than this."""
    max_pass_rate: float | None = None
    """Leave out problems that are easier than this."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read (counted and said) instead of stopping."""
    split: str = "train"
    """Which file of a folder: train, valid or test."""
    json: bool = False
    """One JSON object on standard output."""

    def __post_init__(self) -> None:
        for name in ("min_pass_rate", "max_pass_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be from 0 to 1, got {value}")
        if self.least > self.most:
            raise UserError(f"--min-pass-rate {self.least:g} is above --max-pass-rate {self.most:g}: no row fits")

    @property
    def least(self) -> float:
        """The smallest pass rate that is kept."""
        return 0.0 if self.min_pass_rate is None else self.min_pass_rate

    @property
    def most(self) -> float:
        """The largest pass rate that is kept."""
        return 1.0 if self.max_pass_rate is None else self.max_pass_rate

    @property
    def chooses(self) -> bool:
        """Whether rows are left out by their rate."""
        return self.min_pass_rate is not None or self.max_pass_rate is not None


class Tally(NamedTuple):
    """Of one problem."""

    right: int
    responses: int

    @property
    def rate(self) -> float:
        """Smoothed pass rate."""
        return round((self.right + 1) / (self.responses + 2), 6)


def difficulty(settings: DifficultySettings) -> dict[str, Any]:
    """Measure, and write where an output is named.

    Returns read, open (rows without responses), problems, mean and shares of the plain pass rates by problem, kept,
    outside (rows left out by their rate), bad [{line, reason}], output. UserError where a row is bad and may not be
    skipped, where the output exists, or nothing is left to write.
    """
    source = sources.resolve(settings.file, settings.split)
    before = sources.stamp(source)
    keys, tallies, bad = _tally(source, settings)
    read = len(keys) + len(bad)
    if bad and not settings.skip_bad_rows:
        refuse(settings.file, read, bad)
    if not tallies:
        raise UserError(f"{settings.file}: none of {read} rows has responses, so there is no pass rate")
    rates = np.array([tally.right / tally.responses for tally in tallies.values()])
    kept = {line for line, key in keys.items() if _fits(tallies.get(key), settings)}
    found = {
        "read": read,
        "open": sum(key not in tallies for key in keys.values()),
        "problems": len(tallies),
        "mean": float(rates.mean()),
        "shares": rate_shares(rates),
        "kept": len(kept),
        "bad": [{"line": line, "reason": reason} for line, reason in bad],
        "output": settings.output,
    }
    found["outside"] = len(keys) - len(kept) - (found["open"] if settings.chooses else 0)
    if settings.output is None:
        return found
    if not kept:
        raise UserError(f"{settings.file}: nothing to write: no problem has a pass rate {_bounds(settings)}")
    with new_file(Path(settings.output).expanduser()) as file:
        for line, value in sources.read(source):
            if line in kept:
                tally = tallies.get(keys[line])
                write_rows(file, [{**value, "pass_rate": tally.rate} if tally else value])
        sources.check_unchanged(source, before)
    return found


def lines_of(found: dict[str, Any], settings: DifficultySettings) -> list[str]:
    """What `difficulty` returns, for the terminal."""
    lines = [f"line {row['line']}: left out: {row['reason']}" for row in found["bad"]]
    said = f"pass rate {found['mean']:.2f} on average of {found['problems']} problems; {told(found['shares'])}"
    lines.append(f"{settings.file}: {said}")
    if found["open"]:
        lines.append(f"{found['open']} of {found['read']} rows have no responses and so no pass rate")
    if settings.chooses:
        lines.append(f"{found['kept']} of {found['read']} rows have a smoothed pass rate {_bounds(settings)}")
    if settings.output:
        lines.append(f"{settings.output}: {found['kept']} rows")
    return lines


def _tally(
    source: Any, settings: DifficultySettings
) -> tuple[dict[int, bytes], dict[bytes, Tally], list[tuple[int, str]]]:
    """Line -> problem, problem -> tally (of those with responses), and the rows that cannot be used."""
    keys: dict[int, bytes] = {}
    tallies: dict[bytes, Tally] = {}
    bad: list[tuple[int, str]] = []
    judge: AbstractContextManager = FlagCheck(settings.verifier) if settings.verifier else nullcontext()
    with judge as flags:
        for entries in _batches(source, bad):
            verdicts: Iterator[bool | None] = iter(())
            if flags:
                texts = [response.text for _, _, _, responses in entries for response in responses]
                verdicts = iter(flags.rights(texts, [row for _, row, _, found in entries for _ in found]))
            for line, row, kind, responses in entries:
                anew = [next(verdicts, None) for _ in responses]
                try:
                    key = problem_key(row)
                    right = [_right(*each, kind, settings) for each in zip(responses, anew, strict=True)]
                except RowError as error:
                    bad.append((line, str(error)))
                    continue
                keys[line] = key
                if right:
                    before = tallies.get(key, Tally(0, 0))
                    tallies[key] = Tally(before.right + sum(right), before.responses + len(right))
    return keys, tallies, sorted(bad)


def _batches(source: Any, bad: list[tuple[int, str]]) -> Iterator[list[tuple[int, dict, str, list[Response]]]]:
    """(line, row, kind, responses), some rows at a time; what is wrong with the others goes to `bad`."""
    batch: list[tuple[int, dict, str, list[Response]]] = []
    for line, value in sources.read(source):
        try:
            if isinstance(value, RowError):
                raise value
            parse(value, "groups")
            batch.append((line, value, *read_responses(value)))
        except RowError as error:
            bad.append((line, str(error)))
        if len(batch) == _ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _right(response: Response, anew: bool | None, kind: str, settings: DifficultySettings) -> bool:
    if anew is not None:
        return anew
    if kind == "scored" and settings.threshold is not None:
        return response.score >= settings.threshold
    if response.score not in (0.0, 1.0):
        raise RowError(f"a score of {response.score:g} is neither 0 nor 1: --threshold says from where on it is right")
    return response.score == 1.0


def _fits(tally: Tally | None, settings: DifficultySettings) -> bool:
    if tally is None:
        return not settings.chooses
    return settings.least <= tally.rate <= settings.most


def _bounds(settings: DifficultySettings) -> str:
    return f"from {settings.least:g} to {settings.most:g}"
