# SPDX-License-Identifier: Apache-2.0
"""Choice of block, position and weight: its numbers are those of models that are really edited, one by one."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_writers import policy_of

from mlx_realign import adapter, capture, demo_world, directions, taps, writers
from mlx_realign.ablation import edit, select, tryout
from mlx_realign.ablation.tryout import Tried
from mlx_realign.policy import Policy

RNG = np.random.default_rng(2)
PROMPTS = [[list(map(int, RNG.integers(3, 300, n))) for n in (5, 9, 7)] for _ in range(2)]
MARKERS = ("rather not talk", "do not speak of", "not something I discuss")


def logits(policy: Policy, prompts: list[list[int]]) -> np.ndarray:
    """Of the next token, float64 [n, V], one prompt at a time."""
    return np.stack([np.array(policy.model(mx.array([p]))[0, -1]).astype(np.float64) for p in prompts])


def log_softmax(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def odds(logps: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    p = np.exp(logps[:, list(tokens)]).sum(-1)
    return np.log(p / (1 - p))


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gemma3_text"])
def test_bypass_induce_and_kl_are_those_of_edited_models(arch: str):
    """Log-odds of three tokens, before a direction's ablation and after, against a model with the adapter on."""
    policy = policy_of(arch)
    found = writers.find(policy)
    base = [log_softmax(logits(policy, side)) for side in PROMPTS]
    tokens = tuple(int(t) for t in np.argsort(base[1].mean(0) - base[0].mean(0))[:200])  # likelier on the positives
    vectors: dict[select.Source, np.ndarray] = {(0, -1): 3 * RNG.standard_normal(64), (0, -2): RNG.standard_normal(64)}
    chosen = select.choose(policy, found, vectors, *PROMPTS, tokens=tokens, max_kl=math.inf)
    assert chosen.read == "log-odds" and len(chosen.candidates) == 2
    for one in chosen.candidates:
        other = policy_of(arch)
        handle = taps.put(
            other.model, taps.blocks(other.model)[0], lambda h, _, v=vectors[one.source]: h + mx.array(v, h.dtype)
        )
        assert one.induce == pytest.approx(odds(log_softmax(logits(other, PROMPTS[1])), tokens).mean(), abs=1e-4)
        handle.remove()
        edit.put_on(other, edit.plan(found, vectors[one.source]))
        after = [log_softmax(logits(other, side)) for side in PROMPTS]
        assert one.bypass == pytest.approx(odds(after[0], tokens).mean(), abs=1e-4)
        kl = (np.exp(base[1]) * (base[1] - after[1])).sum(-1).mean()
        assert one.kl == pytest.approx(kl, abs=1e-4)


def test_log_odds_by_hand():
    logps = mx.log(mx.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    np.testing.assert_allclose(select.log_odds(logps, (0, 1)), [math.log(3), math.log(0.2 / 0.8)], rtol=1e-5)


def test_first_tokens_are_those_that_only_the_behaviour_begins_with():
    showing, others = [[7, 1], [7, 2], [9, 1], [5]], [[5, 1], [5], [8], []]
    assert select.first_tokens(showing, others) == (7, 9)


def test_candidates_are_judged_by_all_three_numbers():
    reading = select.Reading("log-odds", (2.0, -3.0))
    judge = lambda **kwargs: select._judged(select.Candidate(3, -1, **kwargs), reading, 0.1).refused  # noqa: E731
    assert judge(bypass=-1.0, induce=1.0, kl=0.05) == ""
    assert judge(bypass=-1.0, induce=1.0, kl=0.2) == "KL 0.20 is above 0.1"
    assert judge(bypass=-1.0, induce=-1.0, kl=0.05) == "does not induce the behaviour"
    assert judge(bypass=math.nan, induce=1.0, kl=0.05) == "not finite"


def test_screening_keeps_some_of_every_position():
    keys: list[Any] = [(block, position) for position in (-1, -2, "mean") for block in range(20)]
    kept = select._screened(keys, lambda key: key[0] + (100 if key[1] == "mean" else 0), 12)
    assert kept == [(b, p) for p in (-1, -2, "mean") for b in range(4)]


def test_without_tokens_a_state_that_moved_to_the_other_set_scores_low():
    rng = np.random.default_rng(0)
    ahead, behind = rng.standard_normal((30, 64)) + 3, rng.standard_normal((30, 64)) - 3
    policy = policy_of("llama")
    reading = select.cosine_reading(policy, [mx.array(x.astype(np.float32)) for x in (ahead, behind)])
    scores = [reading.scores(policy, mx.array(x.astype(np.float32))).mean() for x in (ahead, behind)]
    assert scores[0] > 0.9 and scores[1] < -0.9 and reading.name == "cosine"


# ------------------------------------------------------------------ by completions


@pytest.mark.slow
def test_the_least_weight_that_suffices_is_taken_and_is_what_an_edited_model_does():
    policy = Policy.load("tiny-chat")
    found = writers.find(policy)
    rows = demo_world.contrast_rows(120)
    sides = [[r["prompt"] for r in rows if r["label"] == label][:40] for label in ("positive", "negative")]
    asked = [capture.encode(policy, side) for side in sides]
    states = [capture.collect(policy, side, positions=(-3,))[:, 1:, 0] for side in asked]
    each = {b: directions.mean_difference(states[0][:, b], states[1][:, b])[None] for b in range(4)}
    candidates: dict[str, tryout.Rows] = {"each": each, "late": states[0][:, 3].mean(0) - states[1][:, 3].mean(0)}
    tried, best = tryout.try_out(policy, found, candidates, asked[0][:16], asked[1][:16], markers=MARKERS)
    assert best and best.gone and best.kl < 0.1 and {one.name for one in tried} == {"each", "late"}
    assert not [one for one in tried if one.name == best.name and one.weight < best.weight and one.left <= best.left]
    edit.put_on(policy, edit.plan(found, candidates[best.name], best.weight))
    replies = [policy.tokenizer.decode(ids) for ids in greedy(policy, asked[0][:16])]
    shows = [any(mark in reply for mark in MARKERS) for reply in replies]
    assert np.mean(shows) == pytest.approx(best.left)
    assert adapter.adapters_of(policy.model)


def greedy(policy: Policy, prompts: list[list[int]]) -> list[list[int]]:
    """By whole forward passes, 32 tokens."""
    made = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(32):
            ids.append(int(np.argmax(logits(policy, [ids])[0])))
            if ids[-1] in policy.tokenizer.eos_token_ids:
                break
        made.append(ids[len(prompt) :])
    return made


def test_markers_that_the_base_does_not_show_decide_nothing():
    policy = Policy.load("tiny-chat")
    asked = capture.encode(policy, ["What is 12 + 13?", "Tell me about the garden."])
    tried, best = tryout.try_out(
        policy, writers.find(policy), {"x": np.ones(192)}, asked, asked, markers=("I cannot",), max_new_tokens=8
    )
    assert (tried, best) == ([], None)


def test_a_candidate_above_the_kl_is_told_not_taken_for_markers_that_fail():
    policy = Policy.load("tiny-chat")
    found, shift = writers.find(policy), np.random.default_rng(0).standard_normal(192)
    rows = [
        [r["prompt"] for r in demo_world.contrast_rows(16) if r["label"] == label] for label in ("positive", "negative")
    ]
    asked = [capture.encode(policy, side) for side in rows]
    tried, best = tryout.try_out(policy, found, {"x": shift}, *asked, markers=MARKERS, max_kl=1e-9)
    assert best and tried[0] == best and best.kl > 1e-9
    base = log_softmax(logits(policy, asked[1]))
    edit.put_on(policy, edit.plan(found, shift, best.weight))
    kl = (np.exp(base) * (base - log_softmax(logits(policy, asked[1])))).sum(-1).mean()
    assert best.kl == pytest.approx(kl, abs=1e-4)


@pytest.mark.parametrize(
    ("start", "suffices", "max_kl", "weights"),
    [
        (1.0, 0.6, 1.0, [1.0, 0.875, 0.75, 0.625, 0.5]),  # the first weight that leaves something ends it
        (1.0, 0.1, 1.0, [1.0, 0.875, 0.75, 0.625, 0.5]),  # none below 0.5
        (1.0, 0.95, 1.0, [1.0, 0.875]),
        (1.0, 0.6, 0.1, [1.0, 0.625, 0.5]),  # 0.2 w^2 is within 0.1 below 0.71
        (1.25, 1.1, 1.0, [1.25, 1.125, 1.0]),  # 1 left some on a few prompts
        (1.25, 1.4, 1.0, [1.25, 1.375, 1.5]),
    ],
)
def test_weights_around_the_one_that_sufficed(start: float, suffices: float, max_kl: float, weights: list[float]):
    """Of a behaviour of which 1/8 is left where the weight is too little by up to 1/8 and so on; 0.2 w^2 nats."""

    def attempt(name: str, weight: float, always: bool = False) -> Tried | None:
        left, kl = max(0.0, np.ceil(8 * (suffices - weight)) / 8), 0.2 * weight**2
        return Tried(name, weight, left, kl, kl, 32) if always or kl <= max_kl else None

    rough = [Tried("x", start, 0.0, 0.2 * start**2, 0.2 * start**2, 12)]
    found = tryout._around("x", rough, attempt, several=True)
    assert [one.weight for one in found] == weights
    best = min(found, key=lambda one: tryout.order(one, max_kl))
    enough = [weight for weight in weights if weight >= suffices]
    assert best.weight == min(enough)
    assert tryout._around("x", rough, attempt, several=False) == found[:1]


def test_the_order_prefers_within_the_kl_then_gone_then_little_change():
    def tried(name: str, left: float, kl: float, worst: float) -> Tried:
        return Tried(name, 1.0, left, kl, worst, 32)

    some = [
        tried("too far", 0.0, 0.2, 0.01),
        tried("half left", 0.5, 0.0, 0.0),
        tried("costly", 0.0, 0.05, 0.08),
        tried("cheap", 0.03, 0.05, 0.02),
    ]
    names = [one.name for one in sorted(some, key=lambda one: tryout.order(one, 0.1))]
    assert names == ["cheap", "costly", "half left", "too far"]
