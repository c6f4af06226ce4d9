# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a rendered conversation are trained: the turns the assistant would generate at that very place.

For the turn at message k, G = template(messages[:k], generation prompt) is what the model would be given, and
E = template(messages[:k+1]) what should then stand there. The turn is trained from where E leaves G to its end token,
if the whole conversation still begins with E up to there; a template that rewrites earlier turns (Qwen3 drops their
<think> blocks) fails that test, and such a turn is left out and counted. A template's {% generation %} markers narrow
a turn further. Token borders are the longest common token prefix with the tokenised G: a merge across the border
belongs to the completion.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..batch import Completion
from .formats import Row, as_messages
from .messages import Message, RowError, is_trained
from .tokens import Encoded, Words, common_prefix, shared_text


class Span(NamedTuple):
    """A trained turn in its rendered text, in characters."""

    start: int
    end: int


class Turn(NamedTuple):
    """One assistant turn: what the model would be given, and that with the turn behind it."""

    opening: str
    text: str
    span: Span


class Layout(NamedTuple):
    """One rendered completion."""

    talk: list[Message]
    opening: str  # the prompt as the model is given it, generation prompt included
    text: str  # the whole conversation up to its last trained turn
    spans: list[Span]
    opens: bool  # the first span stands right behind the opening


class Pieces(NamedTuple):
    """One tokenised row before truncation."""

    prompt: np.ndarray  # int32
    completions: tuple[Completion, ...]


def encode_chats(rows: Sequence[Row], words: Words, counts: Counter) -> list[list[Pieces] | RowError]:
    """Render and tokenise rows with the chat template. counts: turns trained, rewritten, ... are added to it.

    A conversation whose template rewrites earlier turns becomes several examples, each turn trained in one of them.
    """
    layouts = _layouts(rows, words, counts)
    # One entry per completion, in order: (its row, which of the row's examples, how it is laid out).
    good = [
        (i, n, layout)
        for i, found in enumerate(layouts)
        if not isinstance(found, RowError)
        for n, group in enumerate(found)
        for layout in group
    ]
    openings = list({layout.opening: None for _, _, layout in good})
    opened = dict(zip(openings, words.encode(openings), strict=True))
    encoded = _encode_texts([layout for _, _, layout in good], words)
    parts: dict[int, dict[int, list]] = {}
    for (i, n, layout), text in zip(good, encoded, strict=True):
        marks = words.markers([layout.talk], rows[i].options)[0] if words.has_markers else None
        opening = opened[layout.opening].ids
        mask, end = _mask(layout, text, opening, marks, words, counts)
        ids, mask = text.ids[:end], mask[:end]
        if words.end_token is None and words.eos_id is not None:
            ids, mask = np.append(ids, np.int32(words.eos_id)), np.append(mask, True)
        parts.setdefault(i, {}).setdefault(n, []).append((ids, mask, common_prefix(opening, ids)))
    return [
        found if isinstance(found, RowError) else [split(group) for group in parts[i].values()]
        for i, found in enumerate(layouts)
    ]


def split(parts: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Pieces:
    """Cut (ids, mask, prompt tokens) of a row's completions at the prompt they share.

    One completion alone begins at its first trained token, so that all it does not train is prompt.
    """
    ids, mask, _ = parts[0]
    cut = int(np.argmax(mask)) if len(parts) == 1 else min(n for _, _, n in parts)
    cut = max(cut, 1)  # the forward pass needs one token to start from
    return Pieces(ids[:cut], tuple(Completion(ids[cut:], mask[cut:]) for ids, mask, _ in parts))


def _layouts(rows: Sequence[Row], words: Words, counts: Counter) -> list[list[list[Layout]] | RowError]:
    """Per row its examples, per example its completions."""
    jobs: list[tuple[list[Message], dict, bool]] = []  # conversation, options, generation prompt
    plans = []
    for row in rows:
        prompt, completions = as_messages(row)
        jobs.append((prompt, row.options, True))
        first = len(jobs) - 1
        plan = []
        for completion in completions:
            talk = prompt + completion
            steps = []
            for k in range(len(prompt), len(talk)):
                if not is_trained(talk[k]):
                    continue
                if k != len(prompt):
                    jobs.append((talk[:k], row.options, True))
                opening = first if k == len(prompt) else len(jobs) - 1
                jobs.append((talk[: k + 1], row.options, False))
                steps.append((k, opening, len(jobs) - 1))
            plan.append((talk, steps))
        plans.append((first, plan))
    texts = _render(jobs, words)
    return [_lay_out(row, first, plan, texts, words, counts) for row, (first, plan) in zip(rows, plans, strict=True)]


def _lay_out(
    row: Row, first: int, plan: list, texts: list, words: Words, counts: Counter
) -> list[list[Layout]] | RowError:
    used = [texts[first], *(texts[n] for _, steps in plan for step in steps for n in step[1:])]
    error = next((text for text in used if isinstance(text, RowError)), None)
    if error:
        return error
    examples: list[list[Layout]] = [[]]
    seen: Counter = Counter()
    for talk, steps in plan:
        turns = []
        for k, opening, text in steps:
            span = _span(texts[opening], texts[text], talk[:k], row.options, words, seen)
            if span is not None:
                turns.append((k, Turn(texts[opening], texts[text], span)))
        seen["turns_unverified"] += len(steps) - len(turns)
        if not turns:
            return RowError("the chat template renders no assistant turn where the model would generate it")
        layouts = _group(talk, turns)
        if len(plan) == 1:
            examples = [[layout] for layout in layouts]
            seen["rows_split"] += len(layouts) > 1
        else:  # completions that share a prompt cannot be split; the last group has the last turn
            opening = texts[first]
            examples[0].append(layouts[-1]._replace(opening=opening, opens=layouts[-1].opening == opening))
            seen["turns_rewritten"] += len(turns) - len(layouts[-1].spans)
    trained = [len(layout.spans) for group in examples for layout in group]
    seen["turns_trained"] += sum(trained)
    if words.end_token is None:
        seen["ends_added"] += len(trained) if words.eos_id is not None else 0
        seen["turns_without_end_token"] += sum(trained) - (len(trained) if words.eos_id is not None else 0)
    counts.update(seen)
    return examples


def _group(talk: list[Message], turns: list[tuple[int, Turn]]) -> list[Layout]:
    """As few renderings as train each turn once: the longest one, then the longest that still has what it rewrote."""
    layouts = []
    while turns:
        last, text = turns[-1][0], turns[-1][1].text
        kept = [turn for _, turn in turns if text.startswith(turn.text[: turn.span.end])]
        layouts.append(Layout(talk[: last + 1], kept[0].opening, text, [turn.span for turn in kept], True))
        turns = [(k, turn) for k, turn in turns if turn not in kept]
    return layouts[::-1]


def _span(
    opening: str, text: str, before: list[Message], options: dict[str, Any], words: Words, seen: Counter
) -> Span | None:
    """Characters of one turn in `text`: from where it leaves the generation prompt up to its end token."""
    start = len(opening)
    if not text.startswith(opening):
        # A generation prompt may say more than a finished turn keeps (an opening <think>), but not less than a header.
        start = shared_text((opening, text))
        plain = words.render([before], options, generate=False)[0]
        if isinstance(plain, RowError) or start < shared_text((opening, plain)):
            return None
        seen["turns_with_other_opening"] += 1
    if words.end_token is not None:
        at = text.rfind(words.end_token, start)
        end = at + len(words.end_token)
        if at >= 0 and (not text[end:].strip() or text[end:] == words.tail):
            return Span(start, end)
    text = text.rstrip()
    seen["turns_without_end_token"] += words.end_token is not None and not text.endswith(words.special_texts)
    return Span(start, len(text))


def _render(jobs: list[tuple[list[Message], dict, bool]], words: Words) -> list[str | RowError]:
    """Render in as few calls as the options allow; the template library's overhead is per call."""
    groups: dict[str, list[int]] = {}
    for i, (_, options, generate) in enumerate(jobs):
        groups.setdefault(f"{generate}{json.dumps(options, sort_keys=True) if options else ''}", []).append(i)
    texts: list[str | RowError] = [""] * len(jobs)
    for members in groups.values():
        _, options, generate = jobs[members[0]]
        for i, text in zip(members, words.render([jobs[i][0] for i in members], options, generate), strict=True):
            texts[i] = text
    return texts


def _encode_texts(layouts: list[Layout], words: Words) -> list[Encoded]:
    """Character offsets cost time, so only conversations with later turns to find get them."""
    later = [len(layout.spans) > 1 or not layout.opens for layout in layouts]
    out: dict[int, Encoded] = {}
    for offsets in (False, True):
        members = [i for i, value in enumerate(later) if value == offsets]
        out.update(zip(members, words.encode([layouts[i].text for i in members], offsets=offsets), strict=True))
    return [out[i] for i in range(len(layouts))]


def _mask(
    layout: Layout, text: Encoded, opening: np.ndarray, marks: np.ndarray | None, words: Words, counts: Counter
) -> tuple[np.ndarray, int]:
    """bool mask over the tokens of `text`, and where its last trained turn ends."""
    mask, end = np.zeros(len(text.ids), bool), 0
    marked = np.zeros(len(text.ids), bool)
    for i, span in enumerate(layout.spans):
        if i == 0 and layout.opens:
            start = common_prefix(opening, text.ids)
            counts["seams"] += start < len(opening) and layout.text.startswith(layout.opening)
        else:
            start = text.token_at(span.start)
        end = _end(text, span, start, words)
        mask[start:end] = True
        if marks is not None and len(marks) == len(mask) and marks[start:end].any():
            marked[start:end] = marks[start:end]
            marked[end - 1] = True  # the end token is trained even where the markers leave it out
    if marks is not None and not marked.any():
        counts["rows_without_markers"] += 1
    return (marked if marked.any() else mask), end


def _end(text: Encoded, span: Span, start: int, words: Words) -> int:
    """Index behind the last token of a turn; a token that reaches across the end belongs to the turn."""
    if span.end == len(text.text):
        return len(text.ids)
    if words.end_token and words.end_token not in text.text[span.end :]:  # the last one in the text is this turn's
        ends = np.flatnonzero(text.ids[start:] == words.end_id)
        if len(ends) and text.text.endswith(words.end_token, 0, span.end):
            return start + int(ends[-1]) + 1
    return max(text.token_at(span.end), text.token_at(span.end - 1) + 1)
