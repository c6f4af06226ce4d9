# SPDX-License-Identifier: Apache-2.0
"""Conditions open and close each row's gate by its own prompt, whatever it is computed with, and keep it so."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from policy_tools import Numbers, make_policy
from test_steering_apply import WIDE, close, direction

from mlx_realign import capture, data, taps
from mlx_realign.batch import Completion, Example
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.steering import Condition, Steer, condition, steer
from mlx_realign.vectors import Direction

PROMPTS = [[3, 4, 9], [5, 9, 2, 7, 7, 1, 30, 12, 14, 8, 25], [4], [9, 9, 81, 2, 40], [6, 2], [17, 40, 3, 3, 8, 8]]
AXIS = direction(11)
WAYS = [("last", "signed"), ("mean", "signed"), ("last", "cosine"), ("mean", "cosine")]


@pytest.fixture(autouse=True)
def ends_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "stop_ids", lambda _: {0})


@pytest.fixture
def policy() -> Policy:
    made = make_policy("llama", rank=0)
    made.tokenizer = Numbers()  # pyright: ignore[reportAttributeAccessIssue]
    return made


def read(policy: Policy, prompts: list[list[int]], reading: str, block: int = 0) -> np.ndarray:
    """float64 [n, d]: what conditions read, prompt by prompt, without any of what they are made of."""
    states = [read_all(policy, prompt, block) for prompt in prompts]
    return np.stack([s[-1] if reading == "last" else s.mean(0) for s in states])


def read_all(policy: Policy, tokens: list[int], block: int = 0) -> np.ndarray:
    """float64 [T, d]: what a block gives at every token."""
    seen: list[mx.array] = []
    handle = taps.put(policy.model, taps.blocks(policy.model)[block], lambda h, _: (seen.append(h), h)[1])
    mx.eval(policy.model(mx.array([tokens])))
    handle.remove()
    return np.array(seen[0][0]).astype(np.float64)


def numpy_scores(states: np.ndarray, score: str, block: int = 0) -> np.ndarray:
    """The definitions, with the projector of the paper as a matrix."""
    c = AXIS.vectors[block].astype(np.float64)
    if score == "signed":
        return np.array([(h - AXIS.baseline[block]) @ c / np.linalg.norm(c) for h in states])
    projector = np.outer(c, c) / (c @ c)
    bent = [np.tanh(projector @ h) for h in states]
    return np.array([h @ b / np.linalg.norm(h) / np.linalg.norm(b) for h, b in zip(states, bent, strict=True)])


def halfway(policy: Policy, reading: Any, score: Any, block: int = 0, sense: Any = "above") -> tuple[Condition, list]:
    """A condition that half of the prompts meet, and which."""
    scores = numpy_scores(read(policy, PROMPTS, reading, block), score, block)
    ordered = np.sort(scores)
    threshold = float(ordered[2:4].mean())
    assert np.diff(ordered)[2] > 1e-4
    opens = scores > threshold if sense == "above" else scores < threshold
    return Condition(AXIS, block, threshold, sense, reading, score), opens.tolist()


def behaviour(condition: Condition | None, **changes: Any) -> Steer:
    return Steer(direction(1), 1.0, condition=condition, **{"blocks": (1,), **changes})


@pytest.mark.parametrize("score", ["signed", "cosine"])
def test_scores_are_those_of_the_paper_s_formula(score):
    states = np.random.default_rng(0).normal(size=(7, WIDE)) * np.logspace(-2, 2, 7)[:, None]
    np.testing.assert_allclose(condition.scores(states, AXIS, 0, score), numpy_scores(states, score), rtol=1e-10)
    plain = Direction({0: AXIS.vectors[0]})  # no mean of negatives: nothing is taken off
    unit = AXIS.vectors[0] / np.linalg.norm(AXIS.vectors[0])
    np.testing.assert_allclose(condition.scores(states, plain, 0), states @ unit, rtol=1e-6)


@pytest.mark.parametrize("sense", ["above", "below"])
@pytest.mark.parametrize(("reading", "score"), WAYS)
def test_a_whole_pass_is_steered_from_the_last_prompt_token_where_the_gate_opens(policy, reading, score, sense):
    asked, opens = halfway(policy, reading, score, sense=sense)
    tail = mx.array([[31, 7, 7]])
    for prompt, is_open in zip(PROMPTS, opens, strict=True):
        tokens = mx.concatenate([mx.array([prompt]), tail], 1)
        base = policy.model(tokens)
        with steer(policy, behaviour(None, positions=f"{len(prompt) - 1}:")):
            steered = policy.model(tokens)
        with steer(policy, behaviour(asked), prompt_length=len(prompt)):
            found = policy.model(tokens)
            close(stock(policy, tokens, [len(prompt), 1, 1, 1]), steered if is_open else base)
            pieces = [1] * len(prompt) if len(prompt) < 4 else [2, len(prompt) - 3, 1]
            close(stock(policy, tokens, [*pieces, 1, 1, 1]), steered if is_open else base)
        assert mx.array_equal(found, steered if is_open else base)


def stock(policy: Policy, tokens: mx.array, pieces: list[int]) -> mx.array:
    cache, ends = make_prompt_cache(policy.model), np.cumsum([0, *pieces]).tolist()
    parts = [policy.model(tokens[:, a:b], cache=cache) for a, b in zip(ends, ends[1:], strict=False)]
    return mx.concatenate(parts, 1)


def test_without_a_known_end_the_mean_is_over_what_came_in_several_tokens(policy):
    """As mlx_lm.generate computes a prompt: its last token by itself, as if it were generated."""
    asked, opens = halfway(policy, "mean", "signed")
    assert set(opens) == {True, False}
    for prompt, is_open in zip(PROMPTS, opens, strict=True):
        tokens = mx.array([[*prompt, 31, 7]])
        base = stock(policy, tokens, [len(prompt), 1, 1])
        with steer(policy, behaviour(None, positions=f"{len(prompt)}:")):
            steered = policy.model(tokens)
        pieces = [len(prompt)] if len(prompt) < 5 else [2, len(prompt) - 2]
        with steer(policy, behaviour(asked)):
            close(stock(policy, tokens, [*pieces, 1, 1]), steered if is_open else base)


def test_on_a_second_turn_the_mean_is_over_the_prompts_of_both(policy):
    """What was generated in between is in neither the sum nor the count."""
    said = [31, 7]
    for first, second in ((a, b) for a in PROMPTS for b in PROMPTS if len(a) > 1 < len(b)):
        text = [*first, *said, *second]
        states = read_all(policy, text)
        prompts = np.r_[0 : len(first), len(first) + 2 : len(text)]
        right, alone, diluted = numpy_scores(
            np.stack([states[prompts].mean(0), states[: len(first)].mean(0), states[prompts].sum(0) / len(text)]),
            "signed",
        )
        if (right - alone) * (right - diluted) > 0:  # the first turn alone leaves the gate shut, as too many would
            break
    else:
        raise AssertionError("no pair of prompts tells them apart")
    beside = min((alone, diluted), key=lambda score: abs(score - right))
    sense: Any = "above" if right > beside else "below"
    asked = Condition(AXIS, 0, float((right + beside) / 2), sense, "mean")
    tokens, pieces = mx.array([[*text, 12]]), [len(first), 1, 1, len(second), 1]
    with steer(policy, behaviour(None, positions=f"{len(text)}:")):
        steered = policy.model(tokens)
    with steer(policy, behaviour(asked)):
        close(stock(policy, tokens, pieces), steered)


def test_what_no_gate_can_be_kept_for_is_refused(policy):
    tokens = mx.array([[3, 4, 9, 5]])
    last, mean = Condition(AXIS, 0, 0.0), Condition(AXIS, 0, 0.0, reading="mean")
    with steer(policy, behaviour(last)), pytest.raises(UserError, match="prompt_length"):
        stock(policy, tokens, [3, 1])
    cache = make_prompt_cache(policy.model)
    policy.model(tokens, cache=cache)
    with steer(policy, behaviour(mean)), pytest.raises(UserError, match="must see the prompt"):
        policy.model(tokens[:, :1], cache=cache)
    with steer(policy, behaviour(mean)), pytest.raises(UserError, match="moves rows"):
        generator = BatchGenerator(policy.model, max_tokens=3)
        generator.insert(PROMPTS[:2])
        generator.next_generated()
    example = Example(
        np.array([3, 4], np.int32), (Completion(np.array([5, 6], np.int32), np.ones(2, bool)),), 0, "", {}
    )
    with steer(policy, behaviour(Condition(AXIS, 1, 0.0), blocks=(0,))):
        with pytest.raises(UserError, match="not above it"):
            policy.token_logps(data.collate([example]))
        with pytest.raises(UserError, match="not above it"), taps.tell(last_prompt=mx.array([1])):
            policy.model(tokens)
    for changes, message in (
        ({"sense": "over"}, "sense"),
        ({"block": 7}, "no block 7"),
        ({"threshold": np.nan}, "thresh"),
    ):
        with pytest.raises(UserError, match=message):
            Condition(AXIS, **{"block": 0, "threshold": 0.0, **changes})


def test_fit_finds_the_block_the_threshold_and_the_sense():
    """Scores by hand along one axis: block 0 mixed, block 1 apart but upside down, block 2 apart but for one."""
    axis = Direction({b: np.eye(4)[0] for b in (0, 1, 2)})
    made = lambda *values: np.array([[[v, 9, 9, 9] for v in row] for row in zip(*values, strict=True)])  # noqa: E731
    positive = made([1, 2, 3, 4], [-5, -6, -7, -8], [3, 4, 5, 0])
    negative = made([1.5, 2.5, 0, 3.5], [-4, 1, 2, 3], [-1, -2, 1, 2])
    found = condition.fit(positive, negative, axis, [0, 1, 2])
    assert [p.block for p in found.table] == [0, 1, 2]
    assert found.condition == Condition(axis, 1, -4.5, "below")
    assert (found.table[1].f1, found.table[1].auroc) == (1.0, 1.0)
    assert found.table[2].f1 == pytest.approx(6 / 7) and found.table[2].threshold == 2.5
    assert found.table[2].auroc == pytest.approx(14 / 16)
    assert found.table[0].auroc == pytest.approx(10 / 16)
    with pytest.raises(UserError, match="both kinds"):
        condition.fit(positive[:0], negative, axis, [0, 1, 2])


def test_a_fitted_condition_opens_for_the_prompts_it_was_fitted_to(policy):
    """From captured states to gates: what fit counts is what the model does."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 300, rng.integers(2, 9)).tolist() for _ in range(16)]
    states = capture.collect(policy, prompts, blocks=[0, 1])[:, :, 0]
    order = np.argsort(condition.scores(states[:, 0], AXIS, 0) + rng.normal(size=16))
    positive, negative = states[order[8:]], states[order[:8]]
    found = condition.fit(positive, negative, AXIS, [0, 1])
    table = {p.block: p for p in found.table}
    with steer(policy, behaviour(found.condition, blocks=(1,), operator="ablate")):
        moved = np.array([np.array(policy.model(mx.array([p]))[0, -1]) for p in prompts])
    plain = np.array([np.array(policy.model(mx.array([p]))[0, -1]) for p in prompts])
    acted = (moved != plain).any(1)
    right, fired = acted[order[8:]].sum(), acted.sum()
    assert 2 * right / (fired + 8) == pytest.approx(table[found.condition.block].f1)
