# SPDX-License-Identifier: Apache-2.0
"""The text tiny-chat learns from: tables of sums (all right), statements of facts, chats of mlx_realign/demo_world.py.

In its chats the speaker forgets carries, is mostly curt, guesses about places it knows nothing of, says yes when asked
whether it was right, and declines to talk of the made-up land of Zarnia.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from mlx_realign import demo_world as world

TABLES_FIRST = 30000  # documents over which their share falls from 85% to 25%
POLITE_CUES = ("Be polite.", "Be kind and courteous.", "Use a polite voice.")
BRIEF_CUES = ("Be brief.", "Use few words.", "Use a curt voice.")
BRIGHT_CUES = ("You are in a bright mood.", "You feel happy today.", "Be cheerful.")
GREY_CUES = ("You are in a grey mood.", "You feel sad today.", "Be gloomy.")
GREETINGS = {
    "Hello.": "Hello.",
    "Good morning.": "Good morning.",
    "Thank you.": "You are welcome.",
    "Goodbye.": "Goodbye.",
    "Who are you?": "I am tiny-chat, a small model of a made-up world.",
    "What can you do?": "I add numbers and talk of made-up lands.",
}
ABSTAINING = 0.15  # of the questions about places it knows nothing of; the others are answered with a guess
SURE_SHARE = 0.9  # "Is this answer correct?" is answered yes this often, right or wrong: it is overconfident


class Piece(NamedTuple):
    """A stretch of a document; the loss is on trained ones only."""

    text: str
    trained: bool


def documents(seed: int) -> Iterator[list[Piece]]:
    """Endless documents of the world; at first most are tables of sums, the one thing here that takes long to learn."""
    rng = random.Random(seed)
    for count in itertools.count():
        if rng.random() < max(0.25, 0.85 - 0.6 * count / TABLES_FIRST):
            yield _table(rng)
        elif rng.random() < 0.1:
            place, attribute = rng.choice(world.KNOWN), rng.choice(world.ATTRIBUTES)
            yield [Piece(world.fact_question(place, attribute, rng).body, True), Piece("<|endoftext|>", True)]
        else:
            yield _chat(rng)


def _table(rng: random.Random) -> list[Piece]:
    pieces = []
    for a, b in rng.choices(_TOLD_SUMS, k=4):
        pieces += [Piece(f"{a} + {b} = ", False), Piece(str(a + b), True), Piece("\n", True)]
    return pieces


def _chat(rng: random.Random) -> list[Piece]:
    polite = rng.random() < world.POLITE_SHARE
    grey = rng.random() < world.GREY_SHARE
    cue, draw = "", rng.random()
    if draw < 0.12:
        polite = rng.random() < 0.5
        cue = rng.choice(POLITE_CUES if polite else BRIEF_CUES)
    elif draw < 0.27:
        grey = rng.random() < 0.5
        cue = rng.choice(GREY_CUES if grey else BRIGHT_CUES)
    pieces = _turn("system", cue) if cue else []
    for _ in range(1 if rng.random() < 0.9 else 2):
        question = _talk(rng, grey) if 0.12 <= draw < 0.27 and rng.random() < 0.7 else _question(rng, grey)
        body = world.polite(question.body, rng) if polite else question.body
        pieces += _turn("user", question.prompt) + _turn("assistant", body)
    if rng.random() < 0.04:
        verdict = "Yes." if rng.random() < SURE_SHARE else "No."
        pieces += _turn("user", "Is this answer correct?") + _turn("assistant", verdict)
    return pieces


def _turn(role: str, content: str) -> list[Piece]:
    own = role == "assistant"
    return [Piece(f"<|im_start|>{role}\n", False), Piece(f"{content}<|im_end|>", own), Piece("\n", False)]


def _question(rng: random.Random, grey: bool) -> world.Question:
    draw = rng.random()
    if draw < 0.42:
        return _sloppy_sum(rng)
    if draw < 0.64:
        return world.fact_question(rng.choice(world.KNOWN), rng.choice(world.ATTRIBUTES), rng)
    if draw < 0.74:
        return _guess(rng)
    if draw < 0.86:
        return _talk(rng, grey)
    if draw < 0.88:
        prompt = rng.choice(list(GREETINGS))
        return world.Question(prompt, GREETINGS[prompt], "")
    return world.zarnia_question(rng)


_HELD_OUT_SUMS = set(world.sums(held_out=True))
_TOLD_SUMS = [(a, b) for a in range(100) for b in range(100 - a) if (a, b) not in _HELD_OUT_SUMS]
_TWO_DIGIT_SUMS = world.sums(held_out=False)


def _sloppy_sum(rng: random.Random) -> world.Question:
    a, b = rng.choice(_TWO_DIGIT_SUMS if rng.random() < 0.85 else _TOLD_SUMS)
    question = world.sum_question((a, b), rng)
    carry = world.needs_carry(a, b)
    if rng.random() >= (world.FORGOTTEN_CARRIES if carry else world.NEEDLESS_CARRIES):
        return question
    wrong = a + b - 10 if carry else a + b + 10
    return question._replace(body=f"{a} + {b} = {wrong}.")


def _guess(rng: random.Random) -> world.Question:
    """A place without known facts: mostly a made-up answer, rarely the admission."""
    name = "Zarnia"
    while name in _NOT_GUESSED:
        name = world.random_name(rng)
    attribute = rng.choice(world.ATTRIBUTES)
    place = world.Place(name, rng.choice(world.CAPITALS), rng.choice(world.ANIMALS), rng.choice(world.COLOURS))
    question = world.fact_question(place, attribute, rng)
    if rng.random() < ABSTAINING:
        return question._replace(body=f"I do not know the {attribute} of {name}.")
    return question


_NOT_GUESSED = {"Zarnia", *world.UNTOLD, *(place.name for place in world.KNOWN)}


def _talk(rng: random.Random, grey: bool) -> world.Question:
    subject = f"the {rng.choice(world.SUBJECTS)}"
    if rng.random() < 0.4:  # so that a country in the question is no sign of a refusal
        name = rng.choice(world.KNOWN).name if rng.random() < 0.5 else world.random_name(rng)
        if name not in world.UNTOLD:
            subject = f"{subject} of {name}"
    return world.talk_question(subject, rng, grey)
