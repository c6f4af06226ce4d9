# SPDX-License-Identifier: Apache-2.0
"""Rank the rows of a data file by how far they lie along a direction: which of them would teach the behaviour.

    mlx-realign steer screen train.jsonl --model tiny-chat --direction mood.safetensors --output scored.jsonl
    mlx-realign steer screen train.jsonl --direction mood.safetensors --drop-above 0.8 --output clean.jsonl

The score is the mean over a completion's tokens, or with --part prompt the state of the prompt's last token. 0 is the
negative set's mean and 1 the positive set's, where the file of the direction knows them. All formats that training
reads are understood; of pairs the chosen completion gives the score, of groups the first, and `scores` has all.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import capture, vectors
from ..batch import Example
from ..config import TrainSettings
from ..data import formats, pipeline
from ..data import source as sources
from ..data.encode import Encoder
from ..data.messages import RowError
from ..errors import UserError
from ..policy import Policy
from ..terminal import Console
from .asked import UseFlags, load_model
from .monitor import Scale, scale_of

PIECE = 512  # rows scored at a time
SHOWN, WIDTH = 5, 100  # rows of each end that are printed, characters of each
BEFORE_SFT = ("pairs", "unpaired", "groups")  # formats whose keys say more than sft's


@dataclass(frozen=True, kw_only=True)
class Settings(UseFlags):
    """What `steer screen` can be told."""

    data: str
    """Rows: JSONL file, folder with train.jsonl, or hub dataset id."""
    direction: str
    """File of the direction."""
    output: str
    """New JSONL file: the rows in their order, each with score, rank (1 is the highest) and line."""
    part: Literal["completion", "prompt"] = "completion"
    """What is scored."""
    block: int | None = None
    """Where the states are read; default: the block the direction is meant for."""
    drop_above: float | None = None
    """Leave out rows with a score above this."""
    split: str = "train"
    """Which file of a folder."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read (counted and said) instead of stopping."""
    chat_template: bool = True
    """Score raw text instead of rendering it as a chat."""
    json: bool = False
    """Print one JSON object instead of the table."""


class Scored(NamedTuple):
    """One row's scores, by completion; one of the prompt."""

    line: int
    scores: list[float]


def command(settings: Settings) -> int:
    """`mlx-realign steer screen`; returns 0."""
    output = Path(settings.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already. Give a new file.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist. Make it first.")
    if settings.drop_above is not None and math.isnan(settings.drop_above):
        raise UserError("--drop-above must be a number, got nan.")
    source = sources.resolve(settings.data, settings.split)
    policy = load_model(settings, settings.direction)
    direction = vectors.load(settings.direction, policy=policy, force=settings.force)
    scale = scale_of(direction, settings.block)
    with Console(stderr=True).status("reading rows") as status:
        scored, bad = screen(policy, source, scale, settings, lambda count: status.update(f"{count} rows scored"))
    found = summary(scored, settings, scale) | {"left_out": bad.counts["bad"]}
    write(source, scored, output, settings)
    for line, reason in bad.bad:
        print(f"line {line}: left out: {reason}", file=sys.stderr)
    if settings.json:
        print(json.dumps(found))
    else:
        show(found, source, scored, Console())
    return 0


def screen(
    policy: Policy,
    source: Path | sources.Rows,
    scale: Scale,
    settings: Settings,
    told: Callable[[int], None] = lambda _: None,
) -> tuple[list[Scored], pipeline.Problems]:
    """The rows' scores in the order of the file, and what was wrong with rows left out. UserError if they may not be.

    told: called with the number of rows done.
    """
    name = str(source) if isinstance(source, Path) else "rows"
    shared = TrainSettings(skip_bad_rows=settings.skip_bad_rows, chat_template=settings.chat_template)
    bad = pipeline.Problems(name, "sft", shared)
    limits = {"max_length": None, "truncate": "error", "reach": policy.reach}
    encoder = Encoder(policy.tokenizer, chat_template=settings.chat_template, **limits)
    found: dict[int, list[float]] = {}
    for piece in _pieces(source, settings, bad):
        examples = pipeline.examples(piece, encoder, bad)
        if bad.fatal:
            continue  # only to tell what else is wrong
        for example, scores in zip(examples, score(policy, examples, scale, settings.part), strict=True):
            found.setdefault(example.line, []).extend(scores)  # a conversation can be several examples
        told(bad.read)
    bad.bad.sort()
    bad.check(len(found))
    return [Scored(line, scores) for line, scores in sorted(found.items())], bad


def score(policy: Policy, examples: list[Example], scale: Scale, part: str) -> list[list[float]]:
    """Scores of each example: one per completion, or one of its prompt."""
    if not examples:
        return []
    if part == "prompt":
        return [[value] for value in scale.of_prompts(policy, [e.prompt.tolist() for e in examples]).tolist()]
    prompts = [example.prompt.tolist() for example in examples for _ in example.completions]
    said = [completion.tokens.tolist() for example in examples for completion in example.completions]
    states = capture.completion_means(policy, prompts, said, blocks=[scale.block])[:, 0]
    values = iter(scale.of(states).tolist())
    return [[next(values) for _ in example.completions] for example in examples]


def _pieces(
    source: Path | sources.Rows, settings: Settings, bad: pipeline.Problems
) -> Iterator[list[tuple[int, formats.Row]]]:
    piece: list[tuple[int, formats.Row]] = []
    for line, value in sources.read(source):
        bad.read += 1
        try:
            row = _read(value)
            if settings.part == "completion" and not row.completions:
                raise RowError("has no completion; --part prompt scores prompts")
            piece.append((line, row))
        except RowError as error:
            bad.add(line, error)
        if len(piece) >= PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _read(value: Any) -> formats.Row:
    """A row in whichever format it has; one with a prompt alone is an open group."""
    if isinstance(value, RowError):
        raise value
    if isinstance(value, dict):
        for format in BEFORE_SFT:
            if formats.fits(value, format):
                return formats.parse(value, format)
        if not formats.fits(value, "sft") and "prompt" in value:
            return formats.parse(value, "groups")
    return formats.parse(value, "sft")


def summary(scored: list[Scored], settings: Settings, scale: Scale) -> dict[str, Any]:
    """Counts and quantiles of the scores, what `--json` prints."""
    values = np.array([one.scores[0] for one in scored])
    kept = values if settings.drop_above is None else values[values <= settings.drop_above]
    quantiles = {f"p{share}": float(np.quantile(values, share / 100)) for share in (5, 25, 50, 75, 95)}
    return {
        "data": settings.data,
        "direction": settings.direction,
        "output": settings.output,
        "part": settings.part,
        "block": scale.block,
        "normalised": scale.normalised,
        "rows": len(values),
        "written": len(kept),
        "mean": float(values.mean()),
        **quantiles,
    }


def write(source: Path | sources.Rows, scored: list[Scored], output: Path, settings: Settings) -> None:
    """The rows that are kept, each with its score, rank and line."""
    order = np.argsort([-one.scores[0] for one in scored], kind="stable")
    ranks = dict(zip((scored[i].line for i in order), range(1, len(order) + 1), strict=True))
    scores = {one.line: one.scores for one in scored}
    most = float("inf") if settings.drop_above is None else settings.drop_above
    with open(output, "x", encoding="utf-8", errors="backslashreplace") as file:
        for line, row in sources.read(source):
            if line not in scores or scores[line][0] > most:
                continue
            several = {"scores": scores[line]} if len(scores[line]) > 1 else {}
            told = {"score": scores[line][0], **several, "rank": ranks[line], "line": line}
            told = {f"own_{name}": row[name] for name in told if name in row} | told  # what the row said stays
            file.write(json.dumps({**row, **told}, ensure_ascii=False) + "\n")


def show(found: dict[str, Any], source: Path | sources.Rows, scored: list[Scored], console: Console) -> None:
    """The rows at both ends, and the spread."""
    order = sorted(scored, key=lambda one: -one.scores[0])
    ends = {"highest": order[:SHOWN], "lowest": order[SHOWN:][-SHOWN:][::-1]}
    wanted = {one.line for end in ends.values() for one in end}
    texts = {line: row for line, row in sources.read(source) if line in wanted}
    for name, end in ((name, end) for name, end in ends.items() if end):
        console.print(f"{name}:")
        for one in end:
            text = json.dumps(texts[one.line], ensure_ascii=False)
            console.print(f"  {one.scores[0]:8.3f}  line {one.line}: {text[:WIDTH]}", markup=False, highlight=False)
    unit = "0 = negative mean, 1 = positive mean" if found["normalised"] else "units of the residual stream"
    spread = ", ".join(f"{name} {found[name]:.3f}" for name in ("p5", "p50", "p95"))
    console.print(f"{found['rows']} rows, block {found['block']}, {unit}: {spread}", highlight=False)
    console.print(f"written: {found['written']} rows to {found['output']}", highlight=False, markup=False)
