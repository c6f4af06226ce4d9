# SPDX-License-Identifier: Apache-2.0
"""Data before it is trained on: validate, show, convert, difficulty, split, make.

mlx-realign data validate rows.jsonl --method dpo --model tiny-chat --max-length 512
mlx-realign data show rows.jsonl -n 3 --model tiny-chat
mlx-realign data convert groups.jsonl --from grpo --to dpo --output pairs.jsonl
mlx-realign data difficulty groups.jsonl --min-pass-rate 0.2 --output chosen.jsonl
mlx-realign data split rows.jsonl --valid 0.1 --output folder
mlx-realign data make --task sums -n 500 --output sums.jsonl
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cli, flags, loading, methods, reach, untrusted
from ..errors import UserError
from ..terminal import Console
from .convert import ConvertSettings, convert, why_skipped
from .difficulty import DifficultySettings, difficulty
from .difficulty import lines_of as difficulty_lines
from .formats import FORMATS
from .gates import GateSettings
from .group_gates import GroupLimits
from .make import MakeSettings, make
from .show import guess_format, show, write
from .split import SplitSettings, split
from .split import lines_of as split_lines
from .validate import GroupChecks, validate
from .verdicts import describe


@dataclass(frozen=True)
class ValidateSettings:
    """What `data validate` can be told."""

    file: str
    """JSONL file, folder with train/valid/test.jsonl, or hub dataset id."""
    method: str
    """The method that shall read it (sft, dpo ...), or a data format (sft, pairs, unpaired, groups)."""
    model: str | None = None
    """Model folder or hub id: lengths are then in its tokens, rows are also rendered with its chat template."""
    max_length: int | None = None
    """Say how many rows are longer than this many tokens."""
    score_min: float | None = None
    """Of scored groups: a lower score makes the row a bad one."""
    score_max: float | None = None
    """Of scored groups: a higher score makes the row a bad one."""
    verifier: str | None = None
    """Of groups: compare `correct` flags with these verifiers, and name the rows that they cannot judge."""
    chat_template: bool = True
    """Raw text plus end token instead of the chat template."""
    split: str = "train"
    """Which file of a folder: train, valid or test."""
    json: bool = False
    """One JSON object on standard output."""


@dataclass(frozen=True)
class ShowSettings:
    """What `data show` can be told."""

    file: str
    """JSONL file, folder with train/valid/test.jsonl, or hub dataset id."""
    model: str
    """Model folder or hub id whose tokenizer and chat template are used."""
    rows: int = 3
    """How many rows; -n is the same."""
    method: str | None = None
    """The method that shall read it, or a data format; default: what the first row looks like."""
    chat_template: bool = True
    """Raw text plus end token instead of the chat template."""
    split: str = "train"
    """Which file of a folder: train, valid or test."""
    json: bool = False
    """One JSON object per row on standard output."""


def main(argv: list[str]) -> int:
    """`validate` exits 2 when a row is bad, or a gate fails that blocks; what writes rows when one is bad."""
    verb, rest = (argv[0], argv[1:]) if argv else ("", [])
    if verb in ("", "-h", "--help"):
        print(f"usage: mlx-realign data {'|'.join(VERBS)} ... [flags]\n\n{(__doc__ or '').strip()}")
        return 0 if verb else 2
    if verb not in VERBS:
        raise UserError(f"data has no command {verb!r}.{flags.nearest(verb, VERBS)} It has {', '.join(VERBS)}.")
    prog = f"mlx-realign data {verb}"
    if verb == "validate":
        return _validate(*_parse_validate(rest, prog))
    words = ["--rows" if word == "-n" else word for word in rest] if verb in ("show", "make") else rest
    kind, doc, run = _OTHERS[verb]
    positional = [] if verb == "make" else ["file"]
    return run(flags.parse(kind, words, prog=prog, doc=doc, positional=positional))


def _parse_validate(words: list[str], prog: str) -> tuple[ValidateSettings, GateSettings, GroupLimits]:
    """The flags of three dataclasses from one command line."""
    kinds = {"": ValidateSettings, "Gates": GateSettings, "Gates of groups": GroupLimits}
    fields = [flags.fields_of(kind) for kind in kinds.values()]
    try:
        values = flags.scan(words, {name: field for part in fields for name, field in part.items()}, ["file"])
    except flags.HelpAsked:
        print(f"usage: {prog} FILE [flags]\n\nJudge every row and the file as a whole; exit code 2 when a row is bad.")
        for title, part in zip(kinds, fields, strict=True):
            print(f"\n{title}:\n{flags.help_text(part.values())}" if title else f"\n{flags.help_text(part.values())}")
        raise SystemExit(0) from None
    for name in ("file", "method"):
        if name not in values:
            raise UserError(f"{prog} needs {'FILE' if name == 'file' else fields[0][name].flag}: {fields[0][name].doc}")
    of = [{name: value for name, value in values.items() if name in part} for part in fields]
    return ValidateSettings(**of[0]), GateSettings(**of[1]), GroupLimits(**of[2])


def _validate(settings: ValidateSettings, gates: GateSettings, limits: GroupLimits) -> int:
    if settings.max_length is not None and settings.model is None:
        raise UserError("--max-length counts tokens, so it needs --model")
    found = validate(
        settings.file,
        _format(settings.method),
        tokenizer=_tokenizer(settings.model) if settings.model else None,
        reach=reach.of_config(_config(settings.model)) if settings.model else None,
        max_length=settings.max_length,
        chat_template=settings.chat_template,
        split=settings.split,
        gates=gates,
        groups=GroupChecks(limits, settings.score_min, settings.score_max, settings.verifier),
    )
    if settings.json:
        print(json.dumps({"method": settings.method, **found}))
    else:
        _print(found)
    failed = gates.gate == "block" and any(one["verdict"] == "fail" for one in found["gates"])
    return 2 if found["bad"] or failed else 0


def _show(settings: ShowSettings) -> int:
    format = _format(settings.method) if settings.method else guess_format(settings.file, settings.split)
    rows = show(
        settings.file,
        format,
        _tokenizer(settings.model),
        count=settings.rows,
        chat_template=settings.chat_template,
        split=settings.split,
    )
    if settings.json:
        for row in rows:
            print(json.dumps(row))
    else:
        write(rows, Console())
    return 0


def _print(found: dict[str, Any]) -> None:
    for row in found["bad"]:
        print(f"line {row['line']}: {row['reason']}")
    for row in found["warnings"]:
        print(f"line {row['line']}: warning: {row['reason']}")
    print(f"{found['file']}: {found['rows']} rows, {len(found['bad'])} bad, {len(found['warnings'])} warnings")
    lengths = found["lengths"]
    names = ("prompt", "completion", "total")
    if found["good"]:
        print(f"{lengths['unit']:<12}" + "".join(f"{p:>9}" for p in lengths["total"]))
        for name in names:
            print(f"  {name:<10}" + "".join(f"{value:>9}" for value in lengths[name].values()))
    over = found["over_max_length"]
    if over:
        print(
            f"{over['rows']} rows ({over['share']:.1%}) are longer than --max-length {over['max_length']}: training "
            "stops at them unless --truncate says otherwise"
            if over["rows"]
            else f"no row is longer than --max-length {over['max_length']}"
        )
        if over["completion_alone"]:
            print(f"  in {over['completion_alone']} of them the completion alone does not fit")
    for note in found["notes"]:
        print(f"note: {note}")
    for verdict in found["gates"] if found["good"] else []:
        print(describe(verdict))


def _convert(settings: ConvertSettings) -> int:
    found = convert(settings)
    if settings.json:
        print(json.dumps(found))
        return 0
    for row in found["bad"]:
        print(f"line {row['line']}: left out: {row['reason']}")
    if found["skipped"]:
        more = " ..." if found["skipped"] > len(found["skipped_lines"]) else ""
        lines = ", ".join(map(str, found["skipped_lines"])) + more
        print(f"{found['skipped']} of {found['read']} rows skipped (line {lines}): {why_skipped(settings)}")
    print(f"{found['output']}: {found['written']} rows from {found['read']}")
    return 0


def _difficulty(settings: DifficultySettings) -> int:
    found = difficulty(settings)
    return _tell(json.dumps(found) if settings.json else "\n".join(difficulty_lines(found, settings)))


def _split(settings: SplitSettings) -> int:
    found = split(settings)
    return _tell(json.dumps(found) if settings.json else "\n".join(split_lines(found)))


def _make(settings: MakeSettings) -> int:
    found = make(settings)
    text = f"{found['output']}: {found['written']} rows of {found['task']}"
    return _tell(json.dumps(found) if settings.json else text)


def _tell(text: str) -> int:
    print(text)
    return 0


_OTHERS: dict[str, tuple[type, str, Callable[[Any], int]]] = {
    "show": (
        ShowSettings,
        "Print rows as the model sees them: prompt dim, trained tokens green (in brackets without colours).",
        _show,
    ),
    "convert": (
        ConvertSettings,
        "Make pairs of groups, or labelled completions of groups and pairs; nothing is written when a row is bad.",
        _convert,
    ),
    "difficulty": (
        DifficultySettings,
        "Pass rate of each problem by its judged responses; rows with their pass_rate, and only some, into a new file.",
        _difficulty,
    ),
    "split": (SplitSettings, "Share rows out to train, valid and test so that no problem stands on two sides.", _split),
    "make": (MakeSettings, "Make rows whose answers are known, for a verifier to judge by.", _make),
}
VERBS = ("validate", *_OTHERS)


def _format(method: str) -> str:
    return method if method in FORMATS else methods.find(method).FORMAT


def _tokenizer(name: str) -> Any:
    """The tokenizer of a model folder (weights are not asked for) or hub id."""
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(_folder(name), eos_token_ids=_config(name).get("eos_token_id"))
    except UserError:
        raise
    except Exception as error:  # whatever a broken folder makes the readers raise, the user gets one line
        raise UserError(
            f"--model {name}: its tokenizer cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    return loading.find_model(name) if name == loading.EMBEDDED or not folder.exists() else folder


def _config(name: str) -> dict[str, Any]:
    """config.json of a model, or {} where its folder has none: only the tokenizer is needed."""
    path = _folder(name) / "config.json"
    return untrusted.read_json(path) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(cli.run(main))
