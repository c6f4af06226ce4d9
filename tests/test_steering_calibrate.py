# SPDX-License-Identifier: Apache-2.0
"""Calibration spends its budget: measured again, and by NumPy, on the embedded model."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from policy_tools import Numbers, make_policy

from mlx_realign import capture, data, demo_world, rollout
from mlx_realign.distributions import divergence, log_probs
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.sampling import Sampling
from mlx_realign.steering import Steer, steer
from mlx_realign.steering.calibrate import Bench, Search, calibrate
from mlx_realign.vectors import Direction


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load("tiny-chat")


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return capture.encode(policy, [row["prompt"] for row in demo_world.mood_rows(8)])


@pytest.fixture(scope="module")
def direction(policy: Policy, prompts: list[list[int]]) -> Direction:
    rng = np.random.default_rng(0)
    states = capture.collect(policy, prompts)[:, 1:, 0]
    vectors = {block: rng.normal(size=states.shape[-1]) for block in range(states.shape[1])}
    lengths = {block: float(np.median(np.linalg.norm(states[:, block], axis=1))) for block in vectors}
    return Direction(vectors, median_norm=lengths)


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (1.0, {"operator": "add", "blocks": (1,)}),
        (-50.0, {"operator": "add", "blocks": (1, 2), "unit": "median_norm", "positions": "generated"}),
        (0.1, {"operator": "add_norm", "unit": "median_norm"}),
    ],
)
def test_the_coefficient_found_meets_the_budget(policy, prompts, direction, start, options):
    """KL token by token in NumPy's float64 over the model's own completions, written without any of what it uses."""
    found = calibrate(policy, Steer(direction, start, **options), prompts, budget_nats=0.5, tokens=6)
    assert found.reached and len(found.table) <= 8 and math.copysign(1, found.coefficient) == math.copysign(1, start)
    values = []
    made = rollout.rollout(policy, prompts, Sampling(max_new_tokens=6, temperature=0))
    for prompt, (one,) in zip(prompts, made, strict=True):
        tokens = mx.array([[*prompt, *one.tokens.tolist()]])
        both = [policy.model(tokens)]
        with steer(policy, Steer(direction, found.coefficient, **options), prompt_length=len(prompt)):
            both.append(policy.model(tokens))
        base, steered = (log_shares(np.array(x[0])[len(prompt) - 1 : -1]) for x in both)
        values.append((np.exp(steered) * (steered - base)).sum(1))
    kl = np.concatenate(values)
    assert len(kl) == found.tokens
    assert np.quantile(kl, 0.95) == pytest.approx(0.5, rel=0.1)
    assert np.quantile(kl, 0.95) == pytest.approx(found.kl, rel=1e-3)
    last = next(one for one in found.table if one.coefficient == found.coefficient)
    assert (last.mean, last.largest) == (pytest.approx(kl.mean(), rel=1e-3), pytest.approx(kl.max(), rel=1e-3))


def log_shares(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(1, keepdims=True))


def test_what_cannot_be_spent_is_said(policy, prompts, direction):
    ablate = Steer(direction, operator="ablate", blocks=(1,))
    found = calibrate(policy, ablate, prompts, budget_nats=50.0, tokens=2)
    assert (found.coefficient, found.reached) == (1.0, False) and found.kl < 50
    with pytest.raises(UserError, match="no token"):
        calibrate(policy, Steer(direction, blocks=(3,), positions="0:1"), prompts, tokens=2, most=2)
    wrong: list[dict[str, Any]] = [{"budget_nats": 0.0}, {"quantile": 1.5}, {"tokens": 0}, {"most": 0}]
    for options in wrong:
        with pytest.raises(UserError, match=next(iter(options))):
            calibrate(policy, ablate, prompts, **options)
    with pytest.raises(UserError, match="no prompts"):
        calibrate(policy, ablate, [])


def test_the_divergence_counts_what_both_rule_out_as_nothing():
    base, steered = mx.array([[0.0, 1.0, -math.inf]]), mx.array([[2.0, 0.0, -math.inf]])
    p, q = np.exp([2.0, 0.0]) / np.exp([2.0, 0.0]).sum(), np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert np.array(divergence(log_probs(steered), log_probs(base))) == pytest.approx(
        (p * np.log(p / q)).sum(), rel=1e-6
    )
    assert np.array(divergence(log_probs(base), log_probs(base))).tolist() == [0.0]


@pytest.mark.parametrize("first", [1e-3, 0.3, 1.0, 40.0])
@pytest.mark.parametrize("power", [1.0, 2.0, 5.0])
def test_the_search_finds_its_way_from_afar_and_over_curves(first, power):
    """KL = c^power with a bend, up to 14 nats: few steps, whatever the start."""
    curve = lambda c: min(14.0, 0.2 * c**power / (1 + 5 * math.exp(-3 * c)))  # noqa: E731
    search, seen = Search(1.0, first, math.inf), []
    for _ in range(10):
        seen.append(curve(search.next))
        if abs(seen[-1] - 1) < 0.05 or not search.learn(seen[-1]):
            break
    assert seen[-1] == pytest.approx(1, abs=0.05) and len(seen) <= 10


@pytest.mark.parametrize("sharing", [True, False])
def test_both_ways_through_a_model_measure_the_same(sharing, monkeypatch):
    """Prompts in the order of their lengths, against passes over each text alone."""
    policy = make_policy("llama", rank=0)
    policy.tokenizer = Numbers()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(data, "stop_ids", lambda _: {0})
    policy.sharing = sharing
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 300, n).tolist() for n in (1, 3, 9)]
    bench = Bench(policy, prompts, 4)
    assert bench.divergences().tolist() == [0.0] * bench.count
    one, expected = Steer(Direction({0: 3 * rng.normal(size=64)}), positions="last"), []
    for prompt, (made,) in zip(
        prompts, rollout.rollout(policy, prompts, Sampling(max_new_tokens=4, temperature=0)), strict=True
    ):
        tokens = mx.array([[*prompt, *made.tokens.tolist()]])
        base = log_shares(np.array(policy.model(tokens)[0])[len(prompt) - 1 : -1])
        with steer(policy, one, prompt_length=len(prompt)):
            steered = log_shares(np.array(policy.model(tokens)[0])[len(prompt) - 1 : -1])
        expected.append((np.exp(steered) * (steered - base)).sum(1))
    with steer(policy, one):
        np.testing.assert_allclose(bench.divergences(), np.concatenate(expected), rtol=1e-3, atol=1e-5)
