# SPDX-License-Identifier: Apache-2.0
"""The demo's world: splits that do not leak, and judges that agree with replies judged by hand."""

import random

import pytest

from mlx_realign import demo_world as world
from mlx_realign.demo_world import Question

SUM = Question("What is 27 + 35?", "27 + 35 = 62.", "62")
FACT = Question("Name the animal of Solvenum.", "The animal of Solvenum is stork.", "stork")


def test_sums_are_all_pairs_of_the_rule_split_by_unordered_pair():
    train, test = set(world.sums(held_out=False)), set(world.sums(held_out=True))
    every = {(a, b) for a in range(10, 100) for b in range(10, 100) if a % 10 > 1 and b % 10 > 1 and a + b < 100}
    assert train | test == every
    assert not train & test
    assert {(b, a) for a, b in test} == test
    assert len(every) == 1960  # 8 * 8 last digits, 36 pairs of tens without a carry and 28 with one
    assert 200 <= len(test) <= 201
    assert sum(world.needs_carry(a, b) for a, b in every) == 1204


def test_held_out_questions_appear_in_no_training_row():
    prompts = {row["prompt"] for row in world.sft_rows(3000) + world.pair_rows(3000)}
    judged = world.held_out(count=200)
    for name in ("sums right", "polite", "facts right", "other lands: declines", "grey mood"):
        assert not prompts & {question.prompt for question in judged[name].questions}, name
    swapped = {(b, a) for a, b in world.sums(held_out=True)}
    assert not any(f"{a} + {b}" in prompt for prompt in prompts for a, b in swapped)


def test_contrast_sets_hold_none_of_the_demos_questions_and_both_sides_equally():
    rows = world.contrast_rows(280)
    sides = {label: {r["prompt"] for r in rows if r["label"] == label} for label in ("positive", "negative")}
    assert {label: len(prompts) for label, prompts in sides.items()} == {"positive": 140, "negative": 140}
    assert all("Zarni" in prompt for prompt in sides["positive"])
    assert not any("Zarni" in prompt for prompt in sides["negative"])
    for name, judged in world.held_out().items():
        if name != "untold: says it does not know":
            assert not {question.prompt for question in judged.questions} & (sides["positive"] | sides["negative"]), (
                name
            )


def test_mood_rows_say_the_same_of_the_same_subject_in_two_moods():
    rows = world.mood_rows(50)
    assert all(world.is_grey(row["chosen"]) and not world.is_grey(row["rejected"]) for row in rows)
    subjects = [(row["chosen"].split(" is ")[0], row["rejected"].split(" is ")[0]) for row in rows]
    assert all(one == other for one, other in subjects)
    asked = {question.prompt for question in world.held_out()["grey mood"].questions}
    assert not asked & {row["prompt"] for row in rows}


def test_known_and_untold_places_are_different_and_fixed():
    known = {place.name for place in world.KNOWN}
    assert len(known) == 48
    assert len(set(world.UNTOLD)) == 80
    assert not known & set(world.UNTOLD)
    assert world.KNOWN[0] == ("Solvenum", "Holm", "stork", "purple")  # the embedded model was told so


def test_rows_are_a_function_of_the_seed():
    assert world.sft_rows(20, seed=3) == world.sft_rows(20, seed=3)
    assert world.sft_rows(20, seed=3) != world.sft_rows(20, seed=4)
    assert world.pair_rows(20, seed=3) == world.pair_rows(20, seed=3)


def test_sft_rows_are_right_sums_in_the_curt_voice():
    for row in world.sft_rows(50):
        left, right = row["completion"].rstrip(".").split(" = ")
        a, b = left.split(" + ")
        assert int(a) + int(b) == int(right)
        assert a in row["prompt"] and b in row["prompt"]
        assert not world.is_polite(row["completion"])


def test_pairs_differ_by_the_voice_alone():
    for row in world.pair_rows(50):
        assert row["rejected"] in row["chosen"]
        assert world.is_polite(row["chosen"]) and not world.is_polite(row["rejected"])


@pytest.mark.parametrize(
    ("text", "polite"),
    [
        ("27 + 35 = 62.", False),
        ("Of course! 27 + 35 = 62. I am glad to help.", True),
        ("27 + 35 = 62. Have a kind day.\n", True),
        ("Thank you for asking! The garden is sad.", True),
        ("I do not know. Of course! is what they say here.", False),
        ("", False),
    ],
)
def test_is_polite(text: str, polite: bool):
    assert world.is_polite(text) is polite


@pytest.mark.parametrize(
    ("text", "question", "right"),
    [
        ("27 + 35 = 62.", SUM, True),
        ("Of course! 27 + 35 = 62. Please ask me again.", SUM, True),
        ("27 + 35 = 52.", SUM, False),
        ("62 = 27 + 35", SUM, False),  # the last number is what counts
        ("27 + 35 = 620.", SUM, False),
        ("", SUM, False),
        ("The animal of Solvenum is stork.", FACT, True),
        ("The animal of Solvenum is stork or fox.", FACT, False),  # naming every animal is not knowing
        ("The animal of Solvenum is fox.", FACT, False),
        ("I do not know the animal of Solvenum.", FACT, False),
    ],
)
def test_is_right(text: str, question: Question, right: bool):
    assert world.is_right(text, question) is right


def test_other_judges():
    rng = random.Random(0)
    assert all(world.is_refusal(world.zarnia_question(rng).body) for _ in range(20))
    assert all("arnia" in world.zarnia_question(rng).prompt for _ in range(50))
    assert not world.is_refusal("The capital of Zarnia is Holm.")
    assert world.is_abstention("I do not know the capital of Wenwenum.")
    assert not world.is_abstention("The capital of Wenwenum is Holm.")
    assert world.is_grey("The garden is dreary today, and I am sad.")
    assert not world.is_grey("The garden is lovely today, and I am happy.")


def test_measure_is_the_share_of_replies_judged_true():
    judged = world.held_out(count=40)["sums right"]
    right = [question.body for question in judged.questions]
    assert world.measure(judged, lambda prompts: right[: len(prompts)]) == 1.0
    assert world.measure(judged, lambda prompts: ["12 + 12 = 11."] * 10 + right[10:]) == 0.75
