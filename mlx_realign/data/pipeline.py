# SPDX-License-Identifier: Apache-2.0
"""A file of rows -> a tokenised dataset, once: read, check, render, tokenise and store in one streaming pass."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..batch import Example
from ..config import TrainSettings
from ..errors import UserError
from ..reach import Reach
from . import source as sources
from . import store
from .encode import Encoder, TooLong
from .formats import FORMATS, Row, accepted, parse
from .messages import RowError

VERSION = 3  # raise it when the same rows become other tokens
_CHUNK_ROWS, _CHUNK_CHARS = 1000, 4_000_000  # what one call of the tokenizer gets; a larger row goes alone
_SHOWN = 20


def load(
    path: str | Path | sources.Rows,
    tokenizer: Any,
    *,
    format: str,
    settings: TrainSettings,
    split: str = "train",
    progress: Callable[[int], None] | None = None,
    reach: Reach | None = None,
) -> store.Dataset:
    """Tokenise rows of `format` (one of FORMATS) once and open them from the disk cache.

    path: JSONL file, folder with train/valid/test.jsonl (`split` picks), hub dataset id, or a list of dicts.
    reach: limits of the model that shall read them (`Policy.reach`); a row beyond them is a bad one.
    Of settings, chat_template, max_length, truncate and skip_bad_rows count. `progress` is called with the number of
    rows read so far while a file is tokenised (never for one that is cached). Raises UserError with every reason
    (the first 20 rows in full) when rows are bad and skip_bad_rows is off, or too long and truncate is "error".
    """
    if format not in FORMATS:
        raise UserError(f"no data format {format!r}; there are {', '.join(FORMATS)}")
    source = sources.resolve(path, split)
    encoder = Encoder(
        tokenizer,
        chat_template=settings.chat_template,
        max_length=settings.max_length,
        truncate=settings.truncate,
        reach=reach,
    )
    content = sources.content_hash(source)
    fingerprint = _fingerprint(content, encoder, format, settings)
    found = store.find(fingerprint)
    return found if found is not None else _build(source, content, encoder, format, settings, fingerprint, progress)


def _build(
    source: Path | sources.Rows,
    content: str,
    encoder: Encoder,
    format: str,
    settings: TrainSettings,
    fingerprint: str,
    progress: Callable[[int], None] | None,
) -> store.Dataset:
    name = str(source) if isinstance(source, Path) else "rows"
    problems = Problems(name, format, settings)
    digest = hashlib.blake2b(digest_size=16)
    with store.Writer(fingerprint) as writer:
        for chunk in chunks(source, format, problems, digest):
            if not problems.fatal:  # else only look for what else is wrong
                writer.add(examples(chunk, encoder, problems))
            if progress is not None:
                progress(problems.read)
        if isinstance(source, Path) and digest.hexdigest() != content:
            raise sources.changed(source)
        problems.check(writer.rows)
        return writer.finish(_report(writer, encoder, problems))


def examples(chunk: list[tuple[int, Row]], encoder: Encoder, problems: "Problems") -> list[Example]:
    """Tokenise a chunk; rows that turn out bad or too long go to `problems`."""
    try:
        outcomes = encoder.encode(chunk)
    except UserError as error:
        raise UserError(f"{problems.name}: {error}") from None
    good = []
    for (line, _), parts in zip(chunk, outcomes, strict=True):
        for outcome in parts:
            if isinstance(outcome, Example):
                good.append(outcome)
            else:
                problems.add(line, outcome)
    return good


class Problems:
    """Rows that cannot be used: all counted, the first `shown` (None: all) kept in full."""

    def __init__(self, name: str, format: str, settings: TrainSettings, shown: int | None = _SHOWN):
        self.name, self.format, self.settings, self.shown = name, format, settings, shown
        self.read = 0
        self.bad: list[tuple[int, str]] = []
        self.too_long: list[tuple[int, TooLong]] = []
        self.counts: Counter = Counter()

    @property
    def fatal(self) -> bool:
        """Whether the load will end in an error."""
        return bool(self.bad) and not self.settings.skip_bad_rows

    def add(self, line: int, problem: RowError | TooLong) -> None:
        """Count one row that is left out."""
        kind = "too_long" if isinstance(problem, TooLong) else "bad"
        self.counts[kind] += 1
        if isinstance(problem, TooLong):
            if self.shown is None or len(self.too_long) < self.shown:
                self.too_long.append((line, problem))
        elif self.shown is None or len(self.bad) < self.shown:
            self.bad.append((line, str(problem)))

    def check(self, kept: int) -> None:
        """UserError when the rows that are wrong, or that none is left, must stop the run."""
        if not self.read:
            raise UserError(f"{self.name}: the file is empty. {self.format} data has rows {accepted(self.format)}")
        if self.fatal:
            lines = [f"  line {line}: {reason}" for line, reason in self.bad]
            count, more = self.counts["bad"], self.counts["bad"] - len(lines)
            lines += [f"  ... and {more} more (`mlx-realign data validate` lists all)"] if more else []
            raise UserError(
                f"{self.name}: {count} of {self.read} rows cannot be used\n"
                + "\n".join(lines)
                + "\nMend them, or leave them out with --skip-bad-rows."
            )
        limit = self.settings.max_length
        if self.too_long and self.settings.truncate == "error":
            shown = ", ".join(f"{line} ({long.tokens} tokens)" for line, long in self.too_long[:5])
            most = max(long.tokens for _, long in self.too_long)
            raise UserError(
                f"{self.name}: {self.counts['too_long']} of {self.read} rows are longer than --max-length {limit}: "
                f"line {shown}{' ...' if self.counts['too_long'] > 5 else ''}. Raise --max-length (these need {most}), "
                "or choose --truncate left (cut the start of the prompt) or --truncate drop (leave them out)."
            )
        if not kept:
            bad, long = self.counts["bad"], self.counts["too_long"]
            reasons = f"{bad} are bad and {long} too long for --max-length {limit}"
            raise UserError(f"{self.name}: no row is left: of {self.read} rows {reasons}")


def chunks(
    source: Path | sources.Rows, format: str, problems: Problems, digest: Any = None
) -> Iterator[list[tuple[int, Row]]]:
    """Rows that can be read, in pieces that fit into memory; what is wrong with the others goes to `problems`.

    digest: a hash that gets all bytes of the file.
    """
    chunk: list[tuple[int, Row]] = []
    chars = 0
    for line, value in sources.read(source, digest):
        problems.read += 1
        try:
            if isinstance(value, RowError):
                raise value
            row = parse(value, format)
        except RowError as error:
            problems.add(line, error)
            continue
        chunk.append((line, row))
        chars += _chars(row)
        if len(chunk) >= _CHUNK_ROWS or chars >= _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _chars(row: Row) -> int:
    texts = (row.prompt, *row.completions)
    return sum(len(t) if isinstance(t, str) else sum(len(m.get("content") or "") for m in t) for t in texts)


def _fingerprint(content: str, encoder: Encoder, format: str, settings: TrainSettings) -> str:
    parts = [
        VERSION,
        content,
        encoder.words.identity(),
        format,
        settings.chat_template,
        settings.max_length,
        settings.truncate,
        settings.skip_bad_rows,
        encoder.reach,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _report(writer: store.Writer, encoder: Encoder, problems: Problems) -> dict[str, Any]:
    counts = encoder.counts
    bad, long = problems.counts["bad"], problems.counts["too_long"]
    dropped = [f"{bad} bad rows were left out"] if bad else []
    dropped += [f"{long} rows longer than --max-length {problems.settings.max_length} were left out"] if long else []
    return {
        "rows": writer.rows,
        "rows_read": problems.read,
        "completions": writer.completions,
        "tokens": writer.tokens,
        "prompt_tokens": writer.prompt_tokens,
        "trained_tokens": writer.trained,
        "dropped": {key: count for key, count in (("bad", bad), ("too_long", long)) if count},
        "dropped_lines": [  # the first of each kind
            *([line, reason] for line, reason in problems.bad),
            *([line, f"{size.tokens} tokens"] for line, size in problems.too_long),
        ],
        "truncated_rows": counts["truncated_rows"],
        "truncated_tokens": counts["truncated_tokens"],
        "chat_template": encoder.templated,
        "counts": {key: int(value) for key, value in sorted(counts.items()) if value},
        "notes": [*dropped, *notes(encoder, problems.settings.max_length)],
    }


_NOTES = {
    "truncated_rows": "{} rows longer than --max-length {} lost the start of their prompt",
    "turns_cut": "{} early assistant turns of conversations longer than --max-length are context only, or cut",
    "rows_split": "{} conversations became several examples, so that each turn is trained as the model would generate "
    "it: the chat template rewrites earlier turns (drops their thinking, say)",
    "turns_rewritten": "{} assistant turns are not trained: the chat template rewrites earlier turns, and completions "
    "that share a prompt cannot be split",
    "turns_unverified": "{} assistant turns are not trained: the chat template does not render them where the model "
    "would generate them",
    "turns_with_other_opening": "{} assistant turns begin otherwise than the template's generation prompt ends (an "
    "opening <think>, say); they are trained from where the two part",
    "turns_without_prompt": "{} assistant turns are not trained: they open their conversation, before any prompt",
    "messages_unused": "{} messages behind the last trained turn of their conversation are not used",
    "duplicate_responses": "{} responses are left out: their group has the same response already",
    "rows_without_responses": "{} rows have no responses: a run has to generate them",
    "ends_added": "{} completions got the tokenizer's end token: the chat template has none",
    "turns_without_end_token": "{} assistant turns have no end token, so their end is not learned",
    "rows_without_markers": "{} completions have no token between the template's generation markers; their whole "
    "turns are trained",
    "options_unread": "{} rows have chat_template_kwargs that the chat template does not read",
    "seams": "{} completions share a token with the end of their prompt; it belongs to the completion",
}


def notes(encoder: Encoder, max_length: int | None) -> list[str]:
    """What the user should know about how the rows became tokens, one sentence each."""
    lines = [text.format(encoder.counts[key], max_length) for key, text in _NOTES.items() if encoder.counts[key]]
    if told := encoder.reach.note(encoder.longest):
        lines.append(told)
    if encoder.refuses_chats:
        lines.append("the tokenizer has no chat template: rows are raw text plus the end token")
    return lines
