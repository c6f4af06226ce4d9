# SPDX-License-Identifier: Apache-2.0
"""Where a rendered conversation is trained, in characters: the turns the model would generate at that very place.

For the turn at message k, G = template(messages[:k], generation prompt) is what the model would be given, and
E = template(messages[:k+1]) what should then stand there. The turn is trained from where E leaves G to its end token,
if the whole conversation still begins with E up to there. A template that rewrites earlier turns (Qwen3 drops their
<think> blocks) fails that test: such a turn gets a rendering of its own, or, where that cannot be, is counted.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from .formats import Row, as_messages
from .long import LEAST, find_turns
from .messages import Message, RowError, is_trained
from .tokens import Words, shared_text


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


def lay_out_rows(rows: Sequence[Row], words: Words, counts: Counter) -> list[list[list[Layout]] | RowError]:
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
            trained = [k for k in range(len(prompt), len(talk)) if is_trained(talk[k])]
            seen: Counter = Counter()
            found = find_turns(talk, trained, row.options, words, seen, _span) if len(trained) >= LEAST else None
            for k in trained if found is None else ():
                if k != len(prompt):
                    jobs.append((talk[:k], row.options, True))
                opening = first if k == len(prompt) else len(jobs) - 1
                jobs.append((talk[: k + 1], row.options, False))
                steps.append((k, opening, len(jobs) - 1))
            plan.append((talk, steps, found, seen))
        plans.append((first, plan))
    texts = render(jobs, words)
    return [_lay_out(row, first, plan, texts, words, counts) for row, (first, plan) in zip(rows, plans, strict=True)]


def _lay_out(
    row: Row, first: int, plan: list, texts: list, words: Words, counts: Counter
) -> list[list[Layout]] | RowError:
    used = [texts[first], *(texts[n] for _, steps, *_ in plan for step in steps for n in step[1:])]
    error = next((text for text in used if isinstance(text, RowError)), None)
    if error:
        return error
    examples: list[list[Layout]] = [[]]
    seen: Counter = Counter()
    for talk, steps, found, counted in plan:
        for name, count in counted.items():
            seen[name] += count
        turns = []
        for k, opening, text in steps:
            span = _span(texts[opening], texts[text], talk[:k], row.options, words, seen)
            if span is not None:
                turns.append((k, Turn(texts[opening], texts[text], span)))
        seen["turns_unverified"] += len(steps) - len(turns)
        if not turns and found is None:
            return RowError("the chat template renders no assistant turn where the model would generate it")
        layouts = _group(talk, turns) if found is None else [Layout(talk, found.opening, found.text, found.spans, True)]
        if len(plan) == 1:
            examples = [[layout] for layout in layouts]
            seen["rows_split"] += len(layouts) > 1
        else:  # completions that share a prompt cannot be split; the last group has the last turn
            opening = texts[first]
            examples[0].append(layouts[-1]._replace(opening=opening, opens=layouts[-1].opening == opening))
            seen["turns_rewritten"] += len(turns) - len(layouts[-1].spans) if found is None else 0
    trained = [len(layout.spans) for group in examples for layout in group]
    seen["turns_trained"] += sum(trained)
    if words.end_token is None:
        seen["ends_added"] += len(trained) if words.eos_id is not None else 0
        seen["turns_without_end_token"] += sum(trained) - (len(trained) if words.eos_id is not None else 0)
    for name, count in seen.items():  # Counter.update takes ten times as long, and every row comes here
        counts[name] += count
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


def render(jobs: list[tuple[list[Message], dict, bool]], words: Words) -> list[str | RowError]:
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
