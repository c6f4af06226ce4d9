# SPDX-License-Identifier: Apache-2.0
"""One file of rows -> train, valid and test, no problem on two sides.

Rows that ask the same (problems.text_key) go together. Which side a problem goes to depends on the seed and its text
alone, not on the order of the file.
"""

import hashlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import new_folder, open_rows, write_rows
from . import source as sources
from .messages import RowError
from .problems import problem_key

_SHOWN = 20


@dataclass(frozen=True)
class SplitSettings:
    """What `data split` can be told."""

    file: str
    """JSONL file of any format, folder with train/valid/test.jsonl, or hub dataset id."""
    output: str
    """The folder to write train.jsonl, valid.jsonl and test.jsonl into; it must not exist yet, or be empty."""
    by: Literal["problem"] = "problem"
    """What must not stand on two sides: a problem, told by its text but for case and white space."""
    valid: float = 0.1
    """Share of the problems for valid.jsonl."""
    test: float = 0.0
    """Share of the problems for test.jsonl."""
    seed: int = 0
    """Another seed draws other problems."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read (counted and said) instead of stopping."""
    split: str = "train"
    """Which file of a folder: train, valid or test."""
    json: bool = False
    """One JSON object on standard output."""

    def __post_init__(self) -> None:
        for name in ("valid", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be a share from 0 to less than 1, got {getattr(self, name)}")
        if not 0 < self.valid + self.test < 1:
            raise UserError(f"--valid {self.valid:g} --test {self.test:g}: something must go there, and not all of it")


def split(settings: SplitSettings) -> dict[str, Any]:
    """Write the files. Returns rows and problems by side, bad [{line, reason}], output.

    UserError, and no folder, where the output exists, a row is bad and may not be skipped, or the problems are too few.
    """
    source, output = sources.resolve(settings.file, settings.split), Path(settings.output).expanduser()
    before = sources.stamp(source)
    keys, bad = _keys(source)
    if bad and not settings.skip_bad_rows:
        refuse(settings.file, len(keys) + len(bad), bad)
    if not keys:
        raise UserError(f"{settings.file}: there is no row to split")
    sides = _sides(set(keys.values()), settings)
    rows: Counter[str] = Counter()
    with new_folder(output) as folder, ExitStack() as stack:
        names = [side for side in ("train", "valid", "test") if side in sides.values()]
        files = {side: stack.enter_context(open_rows(folder / f"{side}.jsonl")) for side in names}
        for line, value in sources.read(source):
            if line in keys:
                side = sides[keys[line]]
                write_rows(files[side], [value])
                rows[side] += 1
        sources.check_unchanged(source, before)
    return {
        "rows": {side: rows[side] for side in names},
        "problems": {side: count for side, count in Counter(sides.values()).items()},
        "bad": [{"line": line, "reason": reason} for line, reason in bad],
        "output": str(output),
    }


def refuse(name: str, read: int, bad: list[tuple[int, str]]) -> None:
    """UserError that lists the first bad rows."""
    lines = "".join(f"\n  line {line}: {reason}" for line, reason in bad[:_SHOWN])
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise UserError(
        f"{name}: {len(bad)} of {read} rows cannot be used, so nothing was written{lines}{more}\n"
        "Mend them, or leave them out with --skip-bad-rows."
    )


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `split` returns, for the terminal."""
    lines = [f"line {row['line']}: left out: {row['reason']}" for row in found["bad"]]
    for side, rows in found["rows"].items():
        lines.append(f"{found['output']}/{side}.jsonl: {rows} rows of {found['problems'][side]} problems")
    return lines


def _keys(source: Any) -> tuple[dict[int, bytes], list[tuple[int, str]]]:
    """Line -> problem; and the rows that cannot be read."""
    keys: dict[int, bytes] = {}
    known: dict[bytes, bytes] = {}  # one object for each problem, however many rows it has
    bad = []
    for line, value in sources.read(source):
        try:
            if isinstance(value, RowError):
                raise value
            key = problem_key(value)
        except RowError as error:
            bad.append((line, str(error)))
            continue
        keys[line] = known.setdefault(key, key)
    return keys, bad


def _sides(problems: set[bytes], settings: SplitSettings) -> dict[bytes, str]:
    """Problem -> side. They are drawn in the order of their hashes under the seed."""
    draw = lambda key: hashlib.blake2b(key, key=str(settings.seed).encode()[:64], digest_size=16).digest()  # noqa: E731
    order = sorted(problems, key=draw)
    counts = {side: max(1, round(share * len(order))) if share else 0 for side, share in _shares(settings).items()}
    if sum(counts.values()) >= len(order):
        raise UserError(f"{settings.file}: {len(order)} different problems are too few to split; give more rows")
    test, valid = counts["test"], counts["valid"]
    return {key: "test" if i < test else "valid" if i < test + valid else "train" for i, key in enumerate(order)}


def _shares(settings: SplitSettings) -> dict[str, float]:
    return {"test": settings.test, "valid": settings.valid}
