# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a rendered conversation are trained.

Token borders are the longest common token prefix with the tokenised generation prompt: a merge across the border
belongs to the completion. A template's {% generation %} markers narrow a turn further.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..batch import Completion
from .formats import Row, as_messages
from .layout import Layout, Span, lay_out_rows, render
from .messages import RowError
from .tokens import Encoded, Words, common_prefix


class Border(NamedTuple):
    """Where a completion leaves its prompt."""

    at: int  # tokens that it shares with the tokenised prompt
    seam: bool  # whether that is less than the whole prompt


class Pieces(NamedTuple):
    """One tokenised row before truncation."""

    prompt: np.ndarray  # int32
    completions: tuple[Completion, ...]


def encode_chats(rows: Sequence[Row], words: Words, counts: Counter) -> list[list[Pieces] | RowError]:
    """Render and tokenise rows with the chat template. counts: turns trained, rewritten, ... are added to it.

    A conversation whose template rewrites earlier turns becomes several examples, each turn trained in one of them.
    """
    layouts = lay_out_rows(rows, words, counts)
    # One entry per completion, in order: (its row, which of the row's examples, how it is laid out).
    good = [
        (i, n, layout)
        for i, found in enumerate(layouts)
        if not isinstance(found, RowError)
        for n, group in enumerate(found)
        for layout in group
    ]
    encoded = _encode_texts([layout for _, _, layout in good], words)
    borders = _borders([layout for _, _, layout in good], encoded, words)
    parts: dict[int, dict[int, list]] = {}
    for (i, n, layout), text, border in zip(good, encoded, borders, strict=True):
        marks = words.markers([layout.talk], rows[i].options)[0] if words.has_markers else None
        mask, end = _mask(layout, text, border, marks, words, counts)
        ids, mask = text.ids[:end], mask[:end]
        if words.end_token is None and words.eos_id is not None:
            ids, mask = np.append(ids, np.int32(words.eos_id)), np.append(mask, True)
        parts.setdefault(i, {}).setdefault(n, []).append((ids, mask, border.at))
    return [
        found if isinstance(found, RowError) else [split(group) for group in parts[i].values()]
        for i, found in enumerate(layouts)
    ]


def encode_openings(rows: Sequence[Row], words: Words) -> list[Pieces | RowError]:
    """Prompts without completions, token by token what a completion is generated from (`tokens.encode_prompt`)."""
    texts = render([(as_messages(row)[0], row.options, True) for row in rows], words)
    encoded = iter(words.encode([text for text in texts if isinstance(text, str)]))
    return [text if isinstance(text, RowError) else Pieces(next(encoded).ids, ()) for text in texts]


def split(parts: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Pieces:
    """Cut (ids, mask, prompt tokens) of a row's completions at the prompt they share.

    One completion alone begins at its first trained token, so that all it does not train is prompt.
    """
    ids, mask, _ = parts[0]
    cut = int(np.argmax(mask)) if len(parts) == 1 else min(n for _, _, n in parts)
    cut = max(cut, 1)  # the forward pass needs one token to start from
    return Pieces(ids[:cut], tuple(Completion(ids[cut:], mask[cut:]) for ids, mask, _ in parts))


def _encode_texts(layouts: list[Layout], words: Words) -> list[Encoded]:
    """Character offsets cost time, so only conversations with later turns to find get them."""
    later = [len(layout.spans) > 1 or not layout.opens for layout in layouts]
    out: dict[int, Encoded] = {}
    for offsets in (False, True):
        members = [i for i, value in enumerate(later) if value == offsets]
        out.update(zip(members, words.encode([layouts[i].text for i in members], offsets=offsets), strict=True))
    return [out[i] for i in range(len(layouts))]


def _borders(layouts: list[Layout], encoded: list[Encoded], words: Words) -> list[Border]:
    """Longest common token prefix of each completion with its tokenised prompt."""
    found = [_quick_border(layout, text, words) for layout, text in zip(layouts, encoded, strict=True)]
    openings = list({layout.opening: None for layout, border in zip(layouts, found, strict=True) if border is None})
    opened = dict(zip(openings, words.encode(openings), strict=True))
    out = []
    for layout, text, border in zip(layouts, encoded, found, strict=True):
        if border is None:
            ids = opened[layout.opening].ids
            at = common_prefix(ids, text.ids)
            border = Border(at, at < len(ids))
        out.append(border)
    return out


def _quick_border(layout: Layout, text: Encoded, words: Words) -> Border | None:
    """The same without tokenising the prompt, or None where that is not certain.

    A special token splits a text before anything is merged, so up to the last one of its header (the generation
    prompt's constant end) the prompt's tokens are the completion's. It is the last special token before the end token,
    unless what was said contains it.
    """
    header, said = words.header, layout.text[len(layout.opening) :]
    one = layout.opens and len(layout.spans) == 1 and layout.spans[0].start == len(layout.opening)
    known = bool(header and words.end_token) and layout.opening.endswith(header)
    if not (one and known) or words.header_token in said:
        return None
    special = words.special_positions(text.ids)
    ends = np.flatnonzero(text.ids[special] == words.end_id)
    if not len(ends) or ends[-1] == 0:
        return None
    start = int(special[ends[-1] - 1])
    at = start + common_prefix(words.header_ids, text.ids[start:])
    return Border(at, at < start + len(words.header_ids)) if at > start else None


def _mask(
    layout: Layout, text: Encoded, border: Border, marks: np.ndarray | None, words: Words, counts: Counter
) -> tuple[np.ndarray, int]:
    """bool mask over the tokens of `text`, and where its last trained turn ends."""
    mask, end = np.zeros(len(text.ids), bool), 0
    marked = np.zeros(len(text.ids), bool)
    for i, span in enumerate(layout.spans):
        if i == 0 and layout.opens:
            start = border.at
            counts["seams"] += border.seam and layout.text.startswith(layout.opening)
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
    if words.end_token and text.text.find(words.end_token, span.end) < 0:  # the last one in the text is this turn's
        ends = np.flatnonzero(text.ids[start:] == words.end_id)
        if len(ends) and text.text.endswith(words.end_token, 0, span.end):
            return start + int(ends[-1]) + 1
    return max(text.token_at(span.end), text.token_at(span.end - 1) + 1)
