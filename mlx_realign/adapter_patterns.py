# SPDX-License-Identifier: Apache-2.0
"""PEFT's patterns of layers: names as they are, regular expressions in a process of their own that has a deadline.

A regular expression of a few characters can run for years, and Python's engine cannot be stopped from within.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import UserError

SECONDS = 5.0  # for all patterns of an adapter; those of real ones take milliseconds
MOST = 10_000  # patterns
NAME = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")  # no repetition and no choice: matched in one pass
_CHILD = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
try:
    whole = [re.compile(rf"(.*\\.)?({p})$") for p in patterns]
    json.dump([[bool(one.match(path)) for path in paths] for one in whole], sys.stdout)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    json.dump(f"{type(error).__name__}: {error}", sys.stdout)
"""


def first_match(where: Path, name: str, patterns: Iterable[str], paths: Sequence[str]) -> dict[str, str]:
    """Path -> the first pattern that matches it from a dot or its start to its end, as in PEFT; no others.

    UserError, which names the file `where` and the key `name`, for patterns that are none or find no end.
    """
    patterns = list(patterns)
    if len(patterns) > MOST:
        raise UserError(f"{where}: {name} has {len(patterns)} patterns, more than any model has layers.")
    asked = [p for p in patterns if not NAME.fullmatch(p)]
    found = dict(zip(asked, _apart(where, name, asked, paths) if asked else (), strict=True))
    for pattern in set(patterns) - set(asked):
        whole = re.compile(rf"(.*\.)?({pattern})$")
        found[pattern] = [bool(whole.match(path)) for path in paths]
    hits = {path: next((p for p in patterns if found[p][i]), None) for i, path in enumerate(paths)}
    return {path: hit for path, hit in hits.items() if hit is not None}


def _apart(where: Path, name: str, patterns: list[str], paths: Sequence[str]) -> list[list[bool]]:
    """For each pattern, which paths it matches; in another process."""
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([patterns, list(paths)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        told = json.loads(ended.stdout)
    except subprocess.TimeoutExpired:
        told = f"no end within {SECONDS:g} s"
    except ValueError:
        told = "the process that matched it broke off"
    if isinstance(told, str):
        raise UserError(
            f"{where}: {name}: cannot be matched with the names of layers ({told}): {', '.join(patterns)}. "
            "Write the layers' names instead."
        )
    return told
