# SPDX-License-Identifier: Apache-2.0
"""Rows of one method made into rows of another: scored or verified groups to pairs, and either to labelled rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from ..errors import UserError
from ..files import new_file, write_rows
from . import source as sources
from .formats import GROUPS, parse
from .groups import Response, read_response
from .messages import RowError, check_text, kind_of

_SHOWN = 20


@dataclass(frozen=True)
class ConvertSettings:
    """What `data convert` can be told."""

    file: str
    """JSONL file, folder with train/valid/test.jsonl, or hub dataset id."""
    from_: Literal["grpo", "rlvr", "dpo"]
    """What FILE holds. grpo: scored groups; rlvr: verified groups; dpo: pairs."""
    to: Literal["dpo", "kto"]
    """dpo: pairs, which orpo and cpo read too; kto: single completions with a label."""
    output: str
    """The JSONL file to write; it must not exist yet."""
    pairs: Literal["best-worst", "all", "one-vs-all"] | None = None
    """Of a group: best and worst response (the default), every two that differ, or the best against a list of all."""
    min_gap: float | None = None
    """Least score gap of a pair, in the unit of the scores; without it any gap will do. Equal scores never pair."""
    max_pairs_per_prompt: int | None = None
    """Of --pairs all and one-vs-all, only so many: those with the widest gaps."""
    threshold: float | None = None
    """From grpo to kto: a score of at least this is labelled true."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read (counted and said) instead of stopping."""
    split: str = "train"
    """Which file of a folder: train, valid or test."""
    json: bool = False
    """One JSON object on standard output."""

    def __post_init__(self) -> None:
        if self.from_ == self.to:
            raise UserError(f"--from {self.from_} --to {self.to}: there is nothing to convert")
        to_pairs, labels = self.to == "dpo", self.from_ == "grpo" and self.to == "kto"
        for name in ("pairs", "min_gap", "max_pairs_per_prompt"):
            if getattr(self, name) is not None and not to_pairs:
                raise UserError(f"--{name.replace('_', '-')} says how pairs are made, so it does not go with --to kto")
        if labels != (self.threshold is not None):
            needed = "--from grpo --to kto needs --threshold: the score from which a response is good, say 0.5"
            raise UserError(needed if labels else "--threshold goes with --from grpo --to kto only: drop it")
        if self.max_pairs_per_prompt is not None and self.pairs not in ("all", "one-vs-all"):
            raise UserError("--max-pairs-per-prompt goes with --pairs all or one-vs-all: best and worst make one pair")
        if self.min_gap is not None and not 0 <= self.min_gap < float("inf"):
            raise UserError(f"--min-gap must be 0 or more, got {self.min_gap}")
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 1:
            raise UserError(f"--max-pairs-per-prompt must be at least 1, got {self.max_pairs_per_prompt}")


def convert(settings: ConvertSettings) -> dict[str, Any]:
    """Write the converted rows under a temporary name, then rename.

    Returns read, skipped (groups without a gap, ties), skipped_lines (the first 20), bad [{line, reason}], written,
    output. UserError, and no file, where the output exists, a row is bad and may not be skipped, or nothing is left.
    """
    source, output = sources.resolve(settings.file, settings.split), Path(settings.output).expanduser()
    read = written = 0
    skipped: list[int] = []
    bad: list[tuple[int, str]] = []
    with new_file(output) as file:
        for line, value in sources.read(source):
            read += 1
            try:
                made = list(_convert(value, settings))
            except RowError as error:
                bad.append((line, str(error)))
                continue
            skipped += [] if made else [line]
            written += len(made)
            write_rows(file, made)
        _check(settings, read, written, skipped, bad)
    return {
        "read": read,
        "skipped": len(skipped),
        "skipped_lines": skipped[:_SHOWN],
        "bad": [{"line": line, "reason": reason} for line, reason in bad],
        "written": written,
        "output": str(output),
    }


def why_skipped(settings: ConvertSettings) -> str:
    """What a row that gives no new row lacks."""
    if settings.from_ == "dpo":
        return "a tie: neither completion is the better one"
    return "no two responses differ in score" + (f" by {settings.min_gap:g} or more" if settings.min_gap else "")


def _check(
    settings: ConvertSettings, read: int, written: int, skipped: Sequence[int], bad: Sequence[tuple[int, str]]
) -> None:
    if not read:
        raise UserError(f"{settings.file}: the file is empty")
    if bad and not settings.skip_bad_rows:
        shown = "".join(f"\n  line {line}: {reason}" for line, reason in bad[:_SHOWN])
        more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UserError(
            f"{settings.file}: {len(bad)} of {read} rows cannot be converted, so nothing was written{shown}{more}\n"
            "Mend them, or leave them out with --skip-bad-rows."
        )
    if not written:
        raise UserError(
            f"{settings.file}: nothing to write: of {read} rows {len(bad)} are bad and {len(skipped)} skipped "
            f"({why_skipped(settings)})"
        )


def _convert(value: Any, settings: ConvertSettings) -> Iterator[dict[str, Any]]:
    """The rows that one row becomes."""
    if isinstance(value, RowError):
        raise value
    if settings.from_ == "dpo":
        yield from _labelled_pair(value)
        return
    prompt, responses = _group(value, settings.from_)
    kept = _kept(value)
    for response in responses:  # the prompt, system and tools are judged as those of any row
        parse({**kept, "prompt": prompt, "completion": response.text, "label": True}, "unpaired")
    if settings.to == "dpo":
        for pair in _pairs(responses, settings):
            yield {"prompt": prompt, **pair, **kept}
    else:
        least = 1.0 if settings.threshold is None else settings.threshold
        for text, score in responses:
            yield {"prompt": prompt, "completion": text, "label": score >= least, **kept}


def _group(row: Any, format: str) -> tuple[Any, list[Response]]:
    """Prompt and responses of a scored or a verified group."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, found {kind_of(row)}")
    keys = GROUPS[format]
    if missing := [key for key in keys if key not in row]:
        found = ", ".join(repr(key) for key in row) or "none"
        raise RowError(f"keys found: {found}; {format} data has {{{', '.join(keys)}}}: {missing[0]!r} is missing")
    if format == "rlvr":
        check_text(row["problem"], "problem")
        check_text(row["solution"], "solution")
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise RowError(f"'responses' must be a list of responses, found {kind_of(responses) if responses else 'none'}")
    judged = "score" if format == "grpo" else "correct"
    return row[keys[0]], [read_response(response, f"responses[{i}]", judged) for i, response in enumerate(responses)]


def _pairs(responses: Sequence[Response], settings: ConvertSettings) -> Iterator[dict[str, Any]]:
    """Pairs of unequal scores, the widest gap first; of equally wide ones those that come first.

    A text that comes more than once counts once, with the mean of its scores.
    """
    scores: dict[str, tuple[str, list[float]]] = {}
    for text, score in responses:
        scores.setdefault(text.strip(), (text, []))[1].append(score)
    answers = [Response(text, fmean(values)) for text, values in scores.values()]
    gaps = ((round(a.score - b.score, 9), a, b) for a in answers for b in answers)  # 0.7 - 0.55 shall be 0.15
    found = sorted((one for one in gaps if one[0] > 0 and one[0] >= (settings.min_gap or 0)), key=lambda one: -one[0])
    most = settings.max_pairs_per_prompt
    if settings.pairs == "one-vs-all" and found:
        chosen = found[0][1]
        rivals = [worse for _, better, worse in found if better is chosen][:most]
        rejected = {"rejected": [r.text for r in rivals], "rejected_score": [r.score for r in rivals]}
        yield {"chosen": chosen.text, "chosen_score": chosen.score, **rejected}
        return
    for gap, better, worse in found[: most if settings.pairs == "all" else 1]:
        numbers = {"chosen_score": better.score, "rejected_score": worse.score, "margin": gap}
        yield {"chosen": better.text, "rejected": worse.text, **numbers}


def _labelled_pair(value: Any) -> Iterator[dict[str, Any]]:
    """Chosen as good, each rejected as bad; nothing of a tie."""
    row = parse(value, "pairs")
    if row.extras.get("tie"):
        return
    kept = _kept(value)
    for i, completion in enumerate(row.completions):
        yield {"prompt": row.prompt, "completion": completion, "label": i == 0, **kept}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """What is handed on: what goes to the chat template, and what the row says of itself (a gap is a pair's own)."""
    kept = {key: row[key] for key in ("system", "tools", "chat_template_kwargs", "metadata") if key in row}
    if isinstance(kept.get("metadata"), dict):
        kept["metadata"] = {key: value for key, value in kept["metadata"].items() if key != "gap_score"}
    return kept
