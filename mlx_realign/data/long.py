# SPDX-License-Identifier: Apache-2.0
"""Long conversations in linear time: turns are found in one rendering, by what stands around each of them.

A turn's opening and text are renderings of all that precedes it, so n turns ask for 2 n of them, each as long as the
conversation. Nearly every template writes the messages one after the other: then a turn stands in the whole rendering
as it does behind a short conversation of its system prompt, a question and the turn before it. That is looked up for
each turn, and each piece must be found in the whole rendering. For some turns (the first, the last, and one in each
doubling of the length) the two full renderings are made as well and must be what the pieces say. Where anything
differs, as in a template that rewrites earlier turns, all full renderings are made.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .messages import Message, RowError
from .tokens import Words

LEAST = 12  # turns; fewer are rendered one by one


class Found(NamedTuple):
    """A conversation whose turns all stand in one rendering."""

    opening: str  # of the first trained turn
    text: str
    spans: list[Any]  # of the trained turns


class _Piece(NamedTuple):
    """One assistant turn in a short conversation of its own."""

    opening: str
    text: str
    before: int  # where the turn before it ends in both
    start: int
    end: int


FindSpan = Callable[..., Any]  # layout's: (opening, text, messages before, options, words, counts) -> span or None


def find_turns(
    talk: list[Message], trained: Sequence[int], options: dict[str, Any], words: Words, seen: Counter, span: FindSpan
) -> Found | None:
    """The trained turns of a conversation that ends with the last of them; None where they must be rendered in full."""
    first, last = trained[0], trained[-1]
    turns = [k for k in range(first, last + 1) if talk[k]["role"] == "assistant"]
    wanted = set(trained)
    checked = {first, last, trained[-2]} | {trained[len(trained) >> n] for n in range(1, len(trained).bit_length())}
    full = _render(words, options, {k: (talk[:k], talk[: k + 1]) for k in sorted(checked)})
    counts: Counter = Counter()
    pieces = _pieces(talk, turns, wanted, options, words, counts, span) if full else None
    if full is None or pieces is None:
        return None
    opening, text = full[first][0], full[last][1]
    start = span(*full[first], talk[:first], options, words, counts)
    if start is None or not text.startswith(full[first][1][: start.end]):
        return None
    spans, end = [start], start.end
    for k, piece in zip(turns[1:], pieces, strict=True):
        shift, before = end - piece.before, end
        if text[before : piece.end + shift] != piece.text[piece.before : piece.end]:
            return None
        end = piece.end + shift
        one = type(start)(piece.start + shift, end)
        if k in full:
            opened, closed = (text[:before] + part[piece.before :] for part in (piece.opening, piece.text))
            if full[k] != (opened, closed) or span(*full[k], talk[:k], options, words, Counter()) != one:
                return None
        if k in wanted:
            spans.append(one)
    seen.update(counts)
    return Found(opening, text, spans)


def _pieces(
    talk: list[Message],
    turns: list[int],
    trained: set[int],
    options: dict[str, Any],
    words: Words,
    counts: Counter,
    span: FindSpan,
) -> list[_Piece] | None:
    """Of each turn but the first, behind its system prompt, the last question before the turn before it, and that."""
    head = next((i for i, m in enumerate(talk) if m["role"] not in ("system", "developer")), len(talk))
    asked = next((i for i in range(turns[0] - 1, head - 1, -1) if talk[i]["role"] == "user"), None)
    jobs: dict[int, tuple[list[Message], list[Message]]] = {}
    for before, k in zip(turns[:-1], turns[1:], strict=True):
        if asked is None:
            return None
        start = [*talk[:head], talk[asked]]
        jobs[2 * k] = (start, [*start, talk[before]])
        jobs[2 * k + 1] = ([*start, *talk[before:k]], [*start, *talk[before : k + 1]])
        asked = next((i for i in range(k - 1, before, -1) if talk[i]["role"] == "user"), asked)
    texts = _render(words, options, jobs)
    if texts is None:
        return None
    pieces = []
    for k in turns[1:]:
        earlier = span(*texts[2 * k], jobs[2 * k][0], options, words, Counter())
        own = counts if k in trained else Counter()
        found = span(*texts[2 * k + 1], jobs[2 * k + 1][0], options, words, own)
        if earlier is None or found is None or found.start < earlier.end:
            return None
        said, (opening, text) = texts[2 * k][1][: earlier.end], texts[2 * k + 1]
        if not (opening.startswith(said) and text.startswith(said)):
            return None
        pieces.append(_Piece(opening, text, earlier.end, found.start, found.end))
    return pieces


def _render(
    words: Words, options: dict[str, Any], jobs: dict[int, tuple[list[Message], list[Message]]]
) -> dict[int, tuple[str, str]] | None:
    """(as the model is asked, as it stands when the turn is over) of each job; None where one is refused."""
    opened = words.render([job[0] for job in jobs.values()], options, generate=True)
    closed = words.render([job[1] for job in jobs.values()], options, generate=False)
    texts = {}
    for k, a, b in zip(jobs, opened, closed, strict=True):
        if isinstance(a, RowError) or isinstance(b, RowError):
            return None
        texts[k] = (a, b)
    return texts
