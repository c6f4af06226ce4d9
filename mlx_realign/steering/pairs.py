# SPDX-License-Identifier: Apache-2.0
"""The two contrast sets of a direction: prompts that bring a behaviour out (positive), prompts that do not (negative).

Two files, each a .txt with one prompt per line or JSON lines with "prompt"; or one file of JSON lines, each row
{"prompt", "label"} with two label names, {"positive", "negative"} (two prompts that belong together) or {"prompt",
"chosen", "rejected"} (two completions of one prompt). A prompt is a string or a list of messages; "system" may stand
beside it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..data import source as sources
from ..data.messages import Message, RowError, check_prompt, check_system, check_text, kind_of
from ..errors import UserError
from ..flags import nearest

Prompt = str | list[Message]
Given = str | Path | Sequence[Prompt]  # a file, or the prompts themselves

POSITIVE = ("harmful", "positive", "true", "yes", "1")  # labels that say their side themselves
NEGATIVE = ("harmless", "negative", "false", "no", "0")
JSON_LINES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Contrast:
    """Both sets. Completions are empty, or as many as prompts: then the behaviour is in them, not in the prompts."""

    positive: list[Prompt]
    negative: list[Prompt]
    hash: str  # of all that is in here
    paired: bool = False  # whether the i-th of both belong together
    positive_completions: list[str] = field(default_factory=list)
    negative_completions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out, a sentence each


class Entry(NamedTuple):
    """One prompt, and what its row says of it."""

    where: str  # file:line
    prompt: Prompt
    label: str | None = None
    completion: str | None = None
    pair: bool = False  # it came together with one of the other side


def read(
    positive: Given, negative: Given | None = None, *, positive_label: str | None = None, paired: bool = False
) -> Contrast:
    """The contrast of two files, or of one whose rows say their side (negative=None); repeats are left out and noted.

    paired: the i-th prompts of both files belong together, so that only a pair can repeat. positive_label: which of a
    file's two labels is the positive one; harmful/harmless, positive/negative, true/false, yes/no and 1/0 are
    understood without. UserError naming file and line for a row that cannot be read, a set without prompts, a prompt
    that stands in both sets.
    """
    if negative is None:
        entries = list(_entries(positive, "--positive"))
        ahead, behind = _sides(entries, str(positive), positive_label)
    else:
        if positive_label is not None:
            raise UserError("--positive-label is for one file with labels: drop it, or drop --negative.")
        ahead, behind = (_one_side(*given) for given in ((positive, "--positive"), (negative, "--negative")))
        entries = [*ahead, *behind]
    _refuse_shared(ahead, behind)
    belong = all(entry.pair for entry in entries)
    ahead, behind, notes = _distinct(ahead, behind, paired or belong)
    digest = hashlib.blake2b(digest_size=16)
    for side in (ahead, behind):
        digest.update(json.dumps([[entry.prompt, entry.completion] for entry in side], sort_keys=True).encode())
    said = [[entry.completion for entry in side if entry.completion is not None] for side in (ahead, behind)]
    if any(said) and len(said[0]) + len(said[1]) != len(ahead) + len(behind):
        odd = next(entry for entry in entries if entry.completion is None)
        raise UserError(f"{odd.where}: has no chosen and rejected, as other rows have: one file, one kind of row.")
    prompts = [[entry.prompt for entry in side] for side in (ahead, behind)]
    return Contrast(prompts[0], prompts[1], digest.hexdigest(), belong, said[0], said[1], notes)


def as_pairs(contrast: Contrast) -> Contrast:
    """The same sets, the i-th of both belonging together. UserError where they are not as many."""
    if len(contrast.positive) != len(contrast.negative):
        raise UserError(
            f"--paired: {len(contrast.positive)} positive and {len(contrast.negative)} negative prompts are no pairs: "
            "give as many of both, line by line."
        )
    return replace(contrast, paired=True)


def prompts_of(given: Given, flag: str = "--prompts") -> list[Prompt]:
    """The prompts of one file or list, in order, whatever their labels. UserError where there are none."""
    return [entry.prompt for entry in _entries(given, flag) if not entry.pair or entry.label == "positive"]


def rows_of(given: Given, flag: str = "--prompts") -> list[tuple[Prompt, dict[str, Any]]]:
    """Prompts with the rows they stand in, for those who need more of a row. UserError where there are none."""
    found = []
    for where, row in _rows(given, flag):
        try:
            found.append((_read_row(row, where)[0].prompt, row))
        except RowError as error:
            raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"{flag} {given if isinstance(given, str | Path) else 'the list'}: holds no prompt.")
    return found


def _entries(given: Given, flag: str) -> Iterator[Entry]:
    """Every prompt of a file or list. UserError for the first row that cannot be read, and where there is none."""
    found = False
    for where, value in _rows(given, flag):
        try:
            for entry in _read_row(value, where):
                found = True
                yield entry
        except RowError as error:
            raise UserError(f"{where}: {error}") from None
    if not found:
        name = given if isinstance(given, str | Path) else "the list"
        raise UserError(f"{flag} {name}: holds no prompt.")


def _rows(given: Given, flag: str) -> Iterator[tuple[str, Any]]:
    """(where, what stands there): text lines and prompts as {"prompt": ...}, JSON lines as they are."""
    if not isinstance(given, str | Path):
        yield from ((f"{flag}[{i}]", {"prompt": prompt}) for i, prompt in enumerate(given))
        return
    path = Path(given).expanduser()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{flag} {given}: {kind}. Give a .txt with one prompt per line, or a .jsonl with 'prompt'.")
    if path.suffix in JSON_LINES:
        yield from ((f"{path}:{line}", value) for line, value in sources.read(path))
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{flag} {path}: cannot be read: {reason}") from None
    yield from ((f"{path}:{i}", {"prompt": line.strip()}) for i, line in enumerate(lines, 1) if line.strip())


def _read_row(row: Any, where: str) -> list[Entry]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, found {kind_of(row)}")
    sides = ("positive", "negative")
    if all(side in row for side in sides):
        return [Entry(where, _prompt(row, side), side, pair=True) for side in sides]
    if "prompt" not in row:
        keys = ", ".join(row) or "none"
        raise RowError(f"has no 'prompt' (and not both 'positive' and 'negative'); its keys: {keys}")
    if "chosen" in row and "rejected" in row:
        said = [check_text(row[key], key) for key in ("chosen", "rejected")]
        both = zip(sides, said, strict=True)
        return [Entry(where, _prompt(row, "prompt"), side, text, pair=True) for side, text in both]
    return [Entry(where, _prompt(row, "prompt"), _label(row))]


def _prompt(row: dict[str, Any], key: str) -> Prompt:
    try:
        prompt = check_prompt(row[key])
    except RowError as error:
        raise RowError(str(error).replace("'prompt", f"'{key}", 1)) from None
    system = check_system(row, prompt)
    if system is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *turns]


def _label(row: dict[str, Any]) -> str | None:
    value = row.get("label")
    if value is None:
        return None
    if not isinstance(value, str | bool | int):
        raise RowError(f"'label' must be a name, true or false, or 1 or 0, found {kind_of(value)}")
    return str(value).strip().casefold()


def _one_side(given: Given, flag: str) -> list[Entry]:
    """A file that is one set."""
    entries = list(_entries(given, flag))
    if entries[0].pair:
        raise UserError(f"{entries[0].where}: the row has both sides: give this file alone, as --positive.")
    labels = list(dict.fromkeys(entry.label for entry in entries))
    if len(labels) > 1:
        names = ", ".join(repr(label) for label in labels)
        raise UserError(f"{flag} {given}: has rows labelled {names}: give such a file alone, without --negative.")
    return entries


def _sides(entries: list[Entry], name: str, positive_label: str | None) -> tuple[list[Entry], list[Entry]]:
    """The sets of one file whose rows say their side."""
    if bare := next((entry for entry in entries if entry.label is None), None):
        raise UserError(
            f"{bare.where}: says neither its label nor both sides: --negative names the file of the other set, or give "
            "every row a 'label'."
        )
    labels = list(dict.fromkeys(entry.label or "" for entry in entries))
    named = ", ".join(map(repr, labels))
    if len(labels) != 2:
        raise UserError(f"{name}: expected rows of two labels, found {len(labels)}: {named}.")
    if positive_label is not None:
        chosen = positive_label.strip().casefold()
        if chosen not in labels:
            hint = nearest(chosen, labels)
            raise UserError(f"--positive-label {positive_label}: no row has it; the labels are {named}.{hint}")
    else:
        for_it = [label for label in labels if label in POSITIVE]
        against = [label for label in labels if label in NEGATIVE]
        if len(for_it) == 1:
            chosen = for_it[0]
        elif len(against) == 1:
            chosen = next(label for label in labels if label not in against)
        else:
            raise UserError(f"{name}: the labels are {named}: say which is the positive one with --positive-label.")
    return [e for e in entries if e.label == chosen], [e for e in entries if e.label != chosen]


def _refuse_shared(ahead: list[Entry], behind: list[Entry]) -> None:
    """UserError for what stands in both sets: it says nothing about their difference."""
    known = {_content(entry): entry.where for entry in ahead}
    for entry in behind:
        if (where := known.get(_content(entry))) is not None:
            raise UserError(f"{entry.where}: stands in the positive set as well ({where}): take it out of one of them.")


def _distinct(ahead: list[Entry], behind: list[Entry], paired: bool) -> tuple[list[Entry], list[Entry], list[str]]:
    """Both sets without repeats, of which one could be measured on while the direction is from another; what went."""
    if paired and len(ahead) == len(behind):
        both: dict[tuple[str, ...], tuple[Entry, Entry]] = {}
        for pair in zip(ahead, behind, strict=True):
            both.setdefault((_content(pair[0]), _content(pair[1])), pair)
        gone = len(ahead) - len(both)
        notes = [f"{gone} of {len(ahead)} pairs were repeats, and are left out"] if gone else []
        return [one for one, _ in both.values()], [other for _, other in both.values()], notes
    kept, notes = [], []
    for name, entries in (("positive", ahead), ("negative", behind)):
        first: dict[str, Entry] = {}
        for entry in entries:
            first.setdefault(_content(entry), entry)
        kept.append(list(first.values()))
        if gone := len(entries) - len(first):
            notes.append(f"{gone} of {len(entries)} {name} prompts were repeats, and are left out")
    return kept[0], kept[1], notes


def _content(entry: Entry) -> str:
    return json.dumps([entry.prompt, entry.completion], sort_keys=True)
