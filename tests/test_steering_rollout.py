# SPDX-License-Identifier: Apache-2.0
"""Steered rollouts: each row as if it were alone, log-probs those of the whole pass, numbers set without a trace."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from policy_tools import Numbers, make_examples, make_policy
from test_steering_apply import direction, model_of, of

from mlx_realign import data, rollout, taps
from mlx_realign.batch import Completion, Example
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.sampling import Sampling
from mlx_realign.steering import Schedule, Steer, steer
from mlx_realign.vectors import Direction

PROMPTS = [[3, 4, 9], [5, 9, 2, 7, 7, 1, 30, 12, 14, 8, 25], [4], [5, 9, 2, 7, 7, 1, 30, 12, 14, 8, 25]]
GREEDY = Sampling(max_new_tokens=8, temperature=0)


def policy_of(kind: str) -> Policy:
    policy = make_policy(model_of(kind), rank=0)
    policy.sharing = policy.sharing and kind != "gemma2"  # as the check at load finds
    policy.tokenizer = Numbers()  # pyright: ignore[reportAttributeAccessIssue]
    return policy


@pytest.fixture(autouse=True)
def ends_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "stop_ids", lambda _: {0})


def alone(policy: Policy, prompts: list[list[int]], rows: list[Any]) -> list[Any]:
    """Each prompt by itself, with its own steering."""
    found = []
    for prompt, steers in zip(prompts, rows, strict=True):
        with steer(policy, *steers):
            found.append(rollout.rollout(policy, [prompt], GREEDY)[0][0])
    return found


def same(one: Any, other: Any) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_allclose(one.logps, other.logps, atol=2e-4)


ROWS = [
    [of("add", 1, coefficient=0.3)],
    [of("ablate", 2), of("add", 3, blocks=(1,), positions="generated")],
    [of("angular", 5, schedule=Schedule("linear", 4))],
    [of("add", 4, coefficient=0.2, positions="last"), of("clamp", 6, positions="prompt")],
]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "lfm2", "mamba2", "4-bit"])
def test_rows_of_a_rollout_with_vectors_of_their_own_are_what_each_is_alone(kind):
    """Four prompts (two alike, so that prompts must not be shared across configurations), two at a time."""
    policy = policy_of(kind)
    expected = alone(policy, PROMPTS, ROWS)
    with steer(policy, rows=ROWS):
        for rows in (64, 2):
            together = rollout.rollout(policy, PROMPTS, GREEDY, variants=range(4), rows=rows)
            for (one,), other in zip(together, expected, strict=True):
                same(one, other)
    plain = [group[0].tokens.tolist() for group in rollout.rollout(policy, PROMPTS, GREEDY)]
    assert sum(one != other.tokens.tolist() for one, other in zip(plain, expected, strict=True)) >= 3


def test_rows_differ_also_behind_a_block_without_a_cache():
    """Gemma 4's upper blocks use keys and values of lower ones."""
    policy = policy_of("gemma4_text")
    rows = [[Steer(Direction({3: sign * direction(1).vectors[0]}), 0.5)] for sign in (1, -1, 0.5, 2)]
    expected = alone(policy, PROMPTS, rows)
    with steer(policy, rows=rows):
        for (one,), other in zip(rollout.rollout(policy, PROMPTS, GREEDY, variants=range(4)), expected, strict=True):
            same(one, other)
    assert len({tuple(one.tokens.tolist()) for one in expected}) == 4


def test_a_variant_that_is_not_there_is_refused():
    policy = policy_of("llama")
    with steer(policy, rows=ROWS):
        for variants, message in (
            ([0, 1, 2, 4], "no variant 4: there are 4"),
            ([-1] * 4, "no variant -1"),
            ([0], "1 v"),
        ):
            with pytest.raises(UserError, match=message):
                rollout.rollout(policy, PROMPTS, GREEDY, variants=variants)
        found = []
        for variant in (3, 100_000_000):  # told so, nobody looks on the way: beyond the last one is the last one
            with taps.tell(variant=mx.array([variant])):
                found.append(np.array(policy.model(mx.array([PROMPTS[1]]))))
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "4-bit"])
@pytest.mark.parametrize("steers", [(of("add", 1, coefficient=0.3),), (of("ablate", 1), of("add_norm", 2))])
def test_log_probs_of_a_steered_rollout_are_those_of_a_steered_whole_pass(kind, steers):
    policy = policy_of(kind)
    with steer(policy, *steers):
        check_logps(policy)


@pytest.mark.parametrize("positions", ["prompt", "generated", "last", "-2:", "1:14"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2", "mamba2"])
def test_positions_and_schedules_are_alike_in_rollouts_and_whole_passes(kind, positions):
    policy = policy_of(kind)
    with steer(policy, of("add", 1, positions=positions), of("ablate", 2, schedule=Schedule("decay", 2))):
        check_logps(policy)


def check_logps(policy: Policy) -> None:
    groups = rollout.rollout(policy, PROMPTS, Sampling(max_new_tokens=8), group_size=2, seed=3, rows=3)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        whole = tuple(Completion(one.tokens, np.ones(len(one.tokens), bool)) for one in group)
        batch = data.collate([Example(np.array(prompt, np.int32), whole, 0, "", {})])
        for one, row in zip(group, np.array(policy.token_logps(batch)), strict=True):
            assert one.logps == pytest.approx(row[: len(one.tokens)], abs=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "4-bit"])
def test_off_and_coefficient_0_are_the_base_bit_for_bit(kind):
    policy = policy_of(kind)
    asked = Sampling(max_new_tokens=8)
    base = [group[0] for group in rollout.rollout(policy, PROMPTS, asked, seed=1)]
    steers = [of(name, 1, coefficient=0.0) for name in ("add", "add_norm", "angular")]
    with steer(policy, *steers, of("add", 2)) as steering:
        steering.off()
        for (one,), other in zip(rollout.rollout(policy, PROMPTS, asked, seed=1), base, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() and one.logps.tolist() == other.logps.tolist()
        steering.on()
        assert any(
            one.logps.tolist() != other.logps.tolist()
            for (one,), other in zip(rollout.rollout(policy, PROMPTS, asked, seed=1), base, strict=True)
        )


MIXED = [
    [of("add", 1), of("angular", 2)],
    [of("add", 3), of("angular", 4)],
    [of("clamp", 5, schedule=Schedule("decay", 2))],
]


def test_no_number_costs_a_compiled_step_a_new_trace():
    """One Decoder, its step compiled: coefficients, angles, bounds and rows' configurations change between steps."""
    from mlx_realign.decoding import Decoder, Row

    policy = policy_of("llama")
    policy.compile()
    traces: list[int] = []
    with steer(policy, rows=MIXED) as steering:
        handle = taps.put(policy.model, "model.layers.0", lambda h, _: (traces.append(1), h)[1])
        decoder = Decoder(policy, GREEDY, grouped=True)
        made = [Row(np.array(p, np.int32), i, np.zeros(40, np.float32), variant=i % 3) for i, p in enumerate(PROMPTS)]
        decoder.exchange([], made)
        for _ in range(3):
            decoder.step()
        settled = len(traces)
        for change in (
            lambda: steering.set(row=0, coefficient=0.2),
            lambda: steering.set(1, row=1, angle=10.0, adaptive=True),
            lambda: steering.set(row=2, low=-9.0, schedule=Schedule("linear", 9), direction=direction(8)),
            lambda: setattr(decoder.board, "variant", mx.array([2, 1, 0, 0])),
            steering.off,
            steering.on,
        ):
            change()
            before = [row.logps[-1] for row in made]
            decoder.step()
            assert [row.logps[-1] for row in made] != before
        assert len(traces) == settled == 3  # prompts, the first step, which is not compiled, and the trace
        handle.remove()


def test_a_compiled_step_gives_what_one_that_is_not_gives():
    policies = policy_of("llama"), policy_of("llama")
    policies[1].compile()
    found = []
    for policy in policies:
        with steer(policy, rows=MIXED):
            found.append(rollout.rollout(policy, PROMPTS, GREEDY, variants=[2, 1, 0, 0]))
    for (one,), (other,) in zip(*found, strict=True):
        same(one, other)


def test_what_was_compiled_with_one_operator_is_not_used_for_another():
    """Both have as many numbers of the same shapes: what is compiled must be told apart all the same."""
    model, tokens = model_of("llama"), mx.array([PROMPTS[1]])
    compiled = mx.compile(lambda x: model(x), inputs=[model.state])
    for name in ("add_norm", "ablate"):
        with steer(model, of(name, 1, positions="prompt")):
            np.testing.assert_allclose(np.array(compiled(tokens)), np.array(model(tokens)), atol=1e-4)


def batched(policy: Policy, prompts: list[list[int]], rows: int) -> list[Any]:
    """Greedy completions by mlx-lm's generator of batches, with their log-probs."""
    generator = BatchGenerator(policy.model, max_tokens=8, completion_batch_size=rows, prefill_batch_size=rows)
    found = {uid: rollout.Row(np.array([0]), 0, np.zeros(1)) for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for one in responses:
            found[one.uid].tokens.append(one.token)
            found[one.uid].logps.append(float(np.array(one.logprobs[one.token])))
    generator.close()
    return [SimpleNamespace(tokens=np.array(row.tokens), logps=row.logps) for row in found.values()]


@pytest.mark.parametrize(("stock", "ours"), [("all", "all"), ("generated", "-1:"), ("prompt", ":-1"), ("2:7", "2:7")])
def test_mlx_lm_s_own_batches_are_steered_at_the_same_tokens(stock, ours, monkeypatch):
    """Padded prompts of unequal lengths through mlx-lm's generator, which takes a prompt's last token as generated."""
    policy = policy_of("llama")
    monkeypatch.setattr(rollout, "_ends", lambda _: set())
    steers = {name: [of("add", 1, coefficient=0.4, positions=name), of("ablate", 2)] for name in (stock, ours)}
    with steer(policy, *steers[ours]):
        expected = rollout.rollout(policy, PROMPTS, GREEDY)
    with steer(policy, *steers[stock]):
        for rows in (64, 2):
            for one, (other,) in zip(batched(policy, PROMPTS, rows), expected, strict=True):
                same(one, other)


def test_parts_of_a_batch_on_threads_of_their_own_are_steered_alike():
    policies = [make_policy("llama", rank=0, workers=workers) for workers in (1, 2)]
    examples = make_examples([(7, [5, 9]), (3, [12, 1]), (9, [7])])
    totals = []
    for policy in policies:
        with steer(policy, of("ablate", 1, positions="generated"), of("add", 2, schedule=Schedule("decay", 2))):
            totals.append(np.array(policy.token_logps(data.collate(examples))))
    np.testing.assert_allclose(totals[0], totals[1], atol=1e-4)


def test_what_mlx_lm_s_generator_of_batches_cannot_do_is_said():
    policy = policy_of("llama")
    with steer(policy, of("add", 1, positions="last")), pytest.raises(UserError, match="prompt_length"):
        batched(policy, PROMPTS[:2], 2)
    with steer(policy, of("add", 1, schedule=Schedule("decay", 2))), pytest.raises(UserError, match="schedule"):
        batched(policy, PROMPTS[:2], 2)
    with steer(policy, Steer(direction(1))), taps.tell(variant=mx.array([0, 0])):
        with pytest.raises(UserError, match="variant for each"):
            batched(policy, PROMPTS[:2], 2)
