# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient losses through a real policy: on-policy gradients, shared and plain prompts, temperature, cuts."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from policy_tools import flat, gap, make_batch, make_examples, make_policy, naive_logps, with_sharing

from mlx_realign import policy_gradient as pg
from mlx_realign.batch import Batch, LossOutput, Scores
from mlx_realign.methods import grpo
from mlx_realign.policy import Policy
from mlx_realign.sums import add
from mlx_realign.workers import split

SHAPES = [(14, [5, 9, 3]), (3, [12, 1, 6]), (1, [4, 7]), (19, [7, 2])]  # groups of unequal size
ROWS = sum(len(lengths) for _, lengths in SHAPES)
CONFIG = grpo.Config(max_new_tokens=16)


def grouped_batch(**extras: Any) -> Batch:
    batch = make_batch(SHAPES)
    advantages = mx.random.normal((ROWS,), key=mx.random.key(1))
    batch.extras.update({"advantages": advantages, "sampler_logps": mx.zeros(batch.mask.shape), **extras})
    return batch


def gradient(policy: Policy, batch: Batch, config: grpo.Config) -> dict[str, np.ndarray]:
    """Divided as the loop divides it."""
    out, grads = policy.gradients(batch, lambda scores, batch: grpo.loss(scores, batch, config))
    return {k: v / float(out.count.item()) for k, v in flat(grads).items()}  # type: ignore[arg-type]


def reinforce(policy: Policy, batch: Batch, count: float, per_row: Any = None) -> dict[str, np.ndarray]:
    """-sum A grad logp / N, by a loss written here."""

    def loss(scores: Scores, batch: Batch) -> LossOutput:
        weight = batch.extras["advantages"][:, None] * (1.0 if per_row is None else per_row(batch))
        return LossOutput(-(weight * scores.logps).sum(), mx.array(1.0), {})

    return {k: v / count for k, v in flat(policy.gradients(batch, loss)[1]).items()}


@pytest.mark.parametrize("name", ["dapo", "bnpo", "cispo"])
def test_on_policy_the_gradient_is_that_of_reinforce_per_token(name):
    policy, batch = make_policy("llama"), grouped_batch()
    tokens = float(batch.mask.sum().item())  # type: ignore[arg-type]
    found = gradient(policy, batch, replace(CONFIG, loss_type=name))
    assert gap(found, reinforce(policy, batch, tokens)) < 1e-4


def test_on_policy_grpo_weighs_every_completion_alike_and_dr_grpo_by_a_constant():
    policy, batch = make_policy("llama"), grouped_batch()
    inverse = lambda batch: 1 / batch.mask.sum(-1, keepdims=True)  # noqa: E731
    found = gradient(policy, batch, replace(CONFIG, loss_type="grpo"))
    assert gap(found, reinforce(policy, batch, ROWS, inverse)) < 1e-4
    found = gradient(policy, batch, replace(CONFIG, loss_type="dr_grpo"))
    assert gap(found, reinforce(policy, batch, ROWS * 16)) < 1e-4


@pytest.mark.parametrize("name", pg.names())
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3_moe"])
def test_shared_prompts_give_the_gradient_of_plain_ones(name, arch):
    noise = 0.1 * mx.random.normal(make_batch(SHAPES).mask.shape, key=mx.random.key(2))
    policy = make_policy(arch)
    old = policy.token_logps(make_batch(SHAPES)) + noise
    batch = grouped_batch(old_logps=old, ref_token_logps=old - noise * noise)
    config = replace(CONFIG, loss_type=name, kl_coef=0.1, entropy_coef=0.01)
    shared, plain = (gradient(with_sharing(policy, on), batch, config) for on in (True, False))
    assert gap(shared, plain) < 1e-4
    assert any(np.abs(v).max() > 0 for v in shared.values())


@pytest.mark.parametrize("name", [n for n in pg.names() if n != "bnpo"])
def test_cut_into_parts_the_sums_are_the_same(name):
    policy, batch = make_policy("llama"), grouped_batch()
    config = replace(CONFIG, loss_type=name)
    loss = lambda scores, batch: grpo.loss(scores, batch, config)  # noqa: E731
    whole = policy.losses(batch, loss)
    parts = [policy.losses(part, loss) for part in split(batch, 3)]
    assert len(parts) == 3
    together = add(add(parts[0], parts[1]), parts[2])
    assert together.total.item() == pytest.approx(whole.total.item(), rel=1e-4, abs=1e-4)
    assert together.count.item() == pytest.approx(whole.count.item())


def test_equal_rewards_give_no_gradient():
    policy, batch = make_policy("llama"), grouped_batch()
    batch.extras["advantages"] = mx.zeros((ROWS,))
    for name in pg.names():
        assert all(not v.any() for v in gradient(policy, batch, replace(CONFIG, loss_type=name)).values())


@pytest.mark.parametrize("arch", ["llama", "granite", "llama4_text"])  # a bare head, a scaled one, none that is found
def test_log_probs_are_taken_at_the_temperature(arch):
    policy = make_policy(arch)
    examples = make_examples(SHAPES)
    rows = [row for e in examples for row in [e._replace(completions=(c,)) for c in e.completions]]
    policy.prepare_for(frozenset(), 0.7)
    found = np.array(policy.token_logps(make_batch(SHAPES)))
    for row, own in zip(rows, found, strict=True):
        tokens, mask = row.completions[0]
        ids = np.concatenate([row.prompt, tokens])
        logits = np.array(policy.model(mx.array(ids)[None])[0].astype(mx.float32), np.float64)[len(row.prompt) - 1 : -1]
        every = logits / 0.7
        every = (
            every
            - np.log(np.exp(every - every.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - every.max(-1, keepdims=True)
        )
        expected = np.where(mask, every[np.arange(len(tokens)), tokens], 0.0)
        assert own[: len(tokens)] == pytest.approx(expected, abs=1e-4)
    policy.prepare_for(frozenset())
    again = np.array(policy.token_logps(make_batch(SHAPES)))
    plain = naive_logps(policy.model, examples)
    assert again[0][: len(plain[0])] == pytest.approx(plain[0], abs=1e-4)


def test_the_gradient_at_a_temperature_is_that_of_the_scaled_logits():
    """By finite differences of the loss along a random direction of the adapter."""
    policy, batch = make_policy("llama"), grouped_batch()
    policy.prepare_for(frozenset(), 0.6)
    config = replace(CONFIG, loss_type="dapo", temperature=0.6)
    old = policy.token_logps(batch)
    batch.extras["old_logps"] = old
    slopes = gradient(policy, batch, config)
    direction = {k: np.random.default_rng(i).normal(size=v.shape) for i, (k, v) in enumerate(sorted(slopes.items()))}
    start = {k: np.array(v) for k, v in flat(policy.model.trainable_parameters()).items()}

    def value(step: float) -> float:
        moved = [(k, mx.array((start[k] + step * direction[k]).astype(np.float32))) for k in start]
        policy.model.load_weights(moved, strict=False)
        out = policy.losses(batch, lambda scores, batch: grpo.loss(scores, batch, config))
        return float(out.total.item()) / float(out.count.item())  # type: ignore[arg-type]

    step = 1e-3
    expected = sum((slopes[k] * direction[k]).sum() for k in slopes)
    assert (value(step) - value(-step)) / (2 * step) == pytest.approx(expected, rel=0.02)
