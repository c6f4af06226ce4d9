# SPDX-License-Identifier: Apache-2.0
"""Long conversations: the tokens and masks of rendering every turn in full, at a cost that grows as they do."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from data_tools import TEMPLATES, assistant, user, words_tokenizer

from mlx_realign.data import layout, long, show
from mlx_realign.data.chat import Pieces, encode_chats
from mlx_realign.data.formats import parse
from mlx_realign.data.messages import RowError
from mlx_realign.data.tokens import Words

TURN, OPEN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", TEMPLATES["chatml"].rpartition("{% endfor %}")[2]
MORE = {
    # What is special stands before the last question (Mistral), in the first message, or depends on how many there are.
    "before_last": "{% for m in messages %}{% if m.role == 'user' and loop.revindex <= 2 %}g{% endif %}" + TURN
    + "{% endfor %}" + OPEN,
    "in_first": "{% for m in messages %}{{ 'You help' if loop.first }}" + TURN + "{% endfor %}" + OPEN,
    "counted": "{% for m in messages %}" + TURN + "{% endfor %}{{ 'g' if messages | length > 21 }}" + OPEN,
    "numbered": "{% for m in messages %}{{ 'g' if loop.index0 % 3 == 1 }}" + TURN + "{% endfor %}" + OPEN,
    "alternating": "{% for m in messages %}{% if m.role == messages[loop.index0 - 1].role and not loop.first %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + OPEN,
    "later": "{% for m in messages %}{% if m.role == 'assistant' and loop.index > 30 %}e{% endif %}" + TURN
    + "{% endfor %}" + OPEN,
}  # fmt: skip
QUICK = {"chatml", "llama3", "marked", "marked_badly", "phi3", "cohere", "qwen3", "r1", "parts", "endless", "strict"}
QUICK |= {"in_first", "marked_answer"}


def words_of(name: str) -> Words:
    tokenizer = words_tokenizer("chatml")
    tokenizer._tokenizer.chat_template = {**TEMPLATES, **MORE}[name]
    return Words(tokenizer)


def talk(rng: random.Random, turns: int, kind: str) -> list[dict[str, Any]]:
    """plain: question and answer. mixed: system, tools, weights, two in a row. thinking: thoughts in some answers."""
    messages = [{"role": "system", "content": "You"}] if rng.random() < 0.5 else []
    said = lambda: " ".join(rng.choices("abcdefg", k=rng.randint(1, 4)))  # noqa: E731
    for _ in range(turns):
        answer = assistant(said())
        if kind == "thinking" and rng.random() < 0.3:
            answer = assistant(f"<think> {said()} </think>{answer['content']}")
        if kind == "mixed" and rng.random() < 0.2:
            answer["weight"] = 0
        messages += [user(said()), answer]
        if kind == "mixed" and rng.random() < 0.3:
            messages += [{"role": "tool", "content": said()}, assistant(said())][rng.randint(0, 1) :]
        if kind == "mixed" and rng.random() < 0.1:
            messages.insert(-1, user(said()))
    return [*messages, user("a"), assistant("b")]


def encode(words: Words, messages: list[dict], least: int, monkeypatch) -> tuple[Any, Counter]:
    monkeypatch.setattr(layout, "LEAST", least)
    counts: Counter = Counter()
    found = encode_chats([parse({"messages": messages}, "sft")], words, counts)[0]
    if isinstance(found, RowError):
        return str(found), counts
    return [flat(pieces) for pieces in found], Counter({key: value for key, value in counts.items() if value})


def flat(pieces: Pieces) -> tuple:
    return pieces.prompt.tolist(), [(c.tokens.tolist(), c.mask.tolist()) for c in pieces.completions]


@pytest.mark.parametrize("kind", ["plain", "mixed", "thinking"])
@pytest.mark.parametrize("name", [*TEMPLATES, *MORE])
def test_tokens_masks_and_counts_are_those_of_every_turn_rendered_in_full(name, kind, monkeypatch):
    rng, words = random.Random(f"{name} {kind}"), words_of(name)
    for turns in (2, 3, 7, 24):
        messages = talk(rng, turns, kind)
        assert encode(words, messages, 2, monkeypatch) == encode(words, messages, 10**9, monkeypatch), messages


@pytest.mark.parametrize("name", sorted(QUICK))
def test_the_cost_grows_as_the_conversation_does(name, monkeypatch):
    """Messages that the template sees, at 40 turns and at 160: linear where it writes one message after the other."""
    words, seen = words_of(name), []
    render = words.render

    def counted(talks: list, options: dict, generate: bool) -> list:
        seen.extend(map(len, talks))
        return render(talks, options, generate)

    monkeypatch.setattr(words, "render", counted)
    costs = []
    for turns in (40, 160):
        seen.clear()
        encode(words, talk(random.Random(1), turns, "plain"), 12, monkeypatch)
        costs.append(sum(seen))
    assert costs[1] < 4.5 * costs[0]
    assert costs[0] < 20 * 82


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_a_conversation_after_one_question_and_one_with_tools_are_linear_too(kind, monkeypatch):
    """An agent's: one question, then calls and results."""
    words = words_of("chatml")
    messages = [user("a")]
    for i in range(30):
        messages += [assistant("b c"), {"role": "tool", "content": "abcdefg"[i % 7]}]
    messages += [assistant("d")]
    row = parse({"messages": messages}, "sft")
    trained = [k for k in range(1, len(messages)) if messages[k]["role"] == "assistant"]
    found = long.find_turns(messages, trained, row.options, words, Counter(), layout._span)
    assert found is not None and len(found.spans) == 31
    assert encode(words, messages, 2, monkeypatch) == encode(words, messages, 10**9, monkeypatch)


def test_characters_find_their_tokens_by_bisection_as_the_library_finds_them():
    words = words_of("chatml")
    text = "<|im_start|>user\na b  c<|im_end|>\né a b"
    encoded = words.encode([text], offsets=True)[0]
    assert encoded._offsets[2]
    assert [encoded._index(i) for i in range(len(text))] == [
        encoded._encoding.char_to_token(i) for i in range(len(text))
    ]


def test_shown_runs_of_a_long_row_are_its_text(tmp_path):
    tokenizer = words_tokenizer("chatml")
    messages = talk(random.Random(3), 60, "plain")
    row = show.show([{"messages": messages}], "sft", tokenizer, count=1, chat_template=True, split="train")[0]
    completion = row["completions"][0]
    text = row["prompt"] + "".join(run["text"] for run in completion["runs"])
    whole = [*tokenizer.encode(row["prompt"], add_special_tokens=False), *completion["tokens"]]
    assert text == tokenizer.decode(np.array(whole).tolist())
    assert "".join(run["text"] for run in completion["runs"] if run["trained"]).count("<|im_end|>") == 61
