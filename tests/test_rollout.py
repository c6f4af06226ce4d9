# SPDX-License-Identifier: Apache-2.0
"""Rollouts: what is generated together is what each row gives alone, with the log-probs the trainer finds for it."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from policy_tools import ALL, speaking

from mlx_realign import adapter, data, decoding, generate, rollout
from mlx_realign.batch import Completion, Example
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.sampling import Sampling

PROMPTS = ["Hi", "Tell me about the garden.", "Add 27 and 35, please, and then say so.", "?"]
TOKENS = [[3], [5, 9, 2, 7, 7, 1, 30, 12, 14, 8, 25], [4, 8, 15, 16, 23], [6, 2]]  # one longer than any window


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


def alone(policy: Policy, prompt: str, count: int) -> str:
    """Argmax of the whole forward pass, one token at a time, no cache, no padding."""
    ids = data.encode_prompt(prompt, policy.tokenizer)
    start, stops = len(ids), data.stop_ids(policy.tokenizer) | policy.tokenizer.eos_token_ids
    for _ in range(count):
        token = int(np.argmax(np.array(policy.model(mx.array([ids]))[0, -1])))
        if token in stops:
            break
        ids.append(token)
    return policy.tokenizer.decode(ids[start:])


@pytest.fixture(params=ALL)
def any_policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A tiny random model of each kind, its adapter moved away from zero, with a tokenizer of numbers."""
    return speaking(monkeypatch, request.param)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_greedy_completions_together_equal_each_alone(policy, batch_size):
    together = rollout.complete(policy, PROMPTS, max_new_tokens=10, batch_size=batch_size)
    assert together == [alone(policy, prompt, 10) for prompt in PROMPTS]


def test_sampling_is_repeatable_with_a_seed_and_differs_from_greedy(policy):
    draws = [rollout.complete(policy, PROMPTS, max_new_tokens=10, temperature=1.0, seed=5) for _ in range(2)]
    assert draws[0] == draws[1] != rollout.complete(policy, PROMPTS, max_new_tokens=10)


def test_log_probs_of_a_rollout_are_those_of_the_trainer(any_policy):
    """Token by token, with rows that leave and prompts that join: 1e-4 nats, at the sampling temperature."""
    asked = Sampling(max_new_tokens=14, temperature=1.3)
    groups = rollout.rollout(any_policy, TOKENS, asked, group_size=3, seed=4, rows=7)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert len({one.tokens.tobytes() for group in groups for one in group}) > 8
    any_policy.temperature = 1.3
    for prompt, group in zip(TOKENS, groups, strict=True):
        whole = tuple(Completion(one.tokens, np.ones(len(one.tokens), bool)) for one in group)
        batch = data.collate([Example(np.array(prompt, np.int32), whole, 0, "", {})])
        found = np.array(any_policy.token_logps(batch))
        for one, row in zip(group, found, strict=True):
            assert one.logps == pytest.approx(row[: len(one.tokens)], abs=1e-4)


def test_a_seed_gives_the_same_text_whatever_is_generated_with_it(any_policy):
    asked = Sampling(max_new_tokens=12)
    once = rollout.rollout(any_policy, TOKENS, asked, group_size=4, seed=9, rows=16)
    for rows in (3, 5):
        again = rollout.rollout(any_policy, TOKENS, asked, group_size=4, seed=9, rows=rows)
        for a, b in zip(sum(once, []), sum(again, []), strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
    first = rollout.rollout(any_policy, TOKENS[:1], asked, group_size=4, seed=9)
    assert [one.tokens.tolist() for one in first[0]] == [one.tokens.tolist() for one in once[0]]
    other = rollout.rollout(any_policy, TOKENS[:1], asked, group_size=4, seed=10)
    assert [one.tokens.tolist() for one in first[0]] != [one.tokens.tolist() for one in other[0]]


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda p: rollout.rollout(p, [[3], []], Sampling()), "rollout: prompts[1] is empty"),
        (lambda p: rollout.rollout(p, [np.zeros(0, np.int32)], Sampling()), "rollout: prompts[0] is empty"),
        (lambda p: rollout.rollout(p, [[3]], Sampling(), rows=0), "rollout: rows must be at least 1, got 0."),
        (lambda p: rollout.rollout(p, [[3]], Sampling(), group_size=0), "group_size must be at least 1, got 0."),
        (lambda p: rollout.rollout(p, [], Sampling(), group_size=-2), "group_size must be at least 1, got -2."),
        (lambda p: rollout.complete(p, ["Hi"], batch_size=0), "complete: batch_size must be at least 1, got 0."),
        (lambda p: next(generate.Session(p, generate.Settings(model="")).stream([])), "generate: the prompt is empty"),
        (lambda p: generate.Session(p, generate.Settings(model="", max_new_tokens=0)), "--max-new-tokens must be at"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(policy, ask, expected):
    with pytest.raises(UserError) as error:
        ask(policy)
    assert expected in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_model_whose_attention_cannot_be_grouped_generates_the_same(any_policy):
    if not any_policy.sharing:
        pytest.skip("its prompts are not shared at all")
    asked = Sampling(max_new_tokens=8)
    once = rollout.rollout(any_policy, TOKENS, asked, group_size=2, seed=1)
    assert any_policy.groups_rows
    any_policy.tried["grouped"] = "not today"
    again = rollout.rollout(any_policy, TOKENS, asked, group_size=2, seed=1)
    for a, b in zip(sum(once, []), sum(again, []), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_attention_that_would_miss_keys_is_not_grouped(monkeypatch):
    """Gemma 4's upper layers, taken for layers with keys of their own, would see the newest token alone."""
    policy, asked = speaking(monkeypatch, "gemma4_text"), Sampling(max_new_tokens=8, temperature=0)
    right = rollout.rollout(policy, TOKENS, asked)
    assert policy.groups_rows
    monkeypatch.setattr(decoding, "lends", lambda _: False)
    policy.tried.clear()
    again = rollout.rollout(policy, TOKENS, asked)
    assert not policy.groups_rows
    assert [group[0].tokens.tolist() for group in again] == [group[0].tokens.tolist() for group in right]


@pytest.mark.parametrize(("arch", "penalty"), [("llama", 1.3), ("gpt_oss", 1.0)])  # the latter: windows, sinks, experts
def test_a_compiled_step_gives_the_same(arch, penalty, monkeypatch):
    policies = speaking(monkeypatch, arch), speaking(monkeypatch, arch)
    policies[1].compile()
    asked = Sampling(max_new_tokens=70, repetition_penalty=penalty)  # the room for own keys grows on the way
    found = []
    for policy in policies:
        found.append(sum(rollout.rollout(policy, TOKENS, asked, group_size=2, seed=3, rows=5), []))
    assert max(len(one.tokens) for one in found[0]) > 64
    for a, b in zip(*found, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_completions_end_at_end_tokens_stop_strings_or_the_limit(any_policy):
    groups = rollout.rollout(any_policy, TOKENS, Sampling(max_new_tokens=40), group_size=8, seed=2)
    every = sum(groups, [])
    assert {one.finished for one in every} == {True, False} or all(one.finished for one in every)
    for one in every:
        ends = [int(t) for t in one.tokens if int(t) in (0, 11)]
        assert one.finished == (one.tokens[-1] in (0, 11))
        assert len(ends) == int(one.finished)
        assert one.finished or len(one.tokens) == 40
        assert one.text == " ".join(map(str, one.tokens[: -1 if one.finished else None]))
    stopped = rollout.rollout(any_policy, TOKENS, Sampling(max_new_tokens=40, stop=("7",)), group_size=8, seed=2)
    for one, cut in zip(every, sum(stopped, []), strict=True):
        assert cut.text == one.text.split("7")[0]
        assert cut.finished == (one.finished or "7" in one.text)
        assert one.tokens[: len(cut.tokens)].tolist() == cut.tokens.tolist()


def test_the_adapter_in_training_is_what_speaks(tiny_model_dir: Path):
    policy = Policy.load(str(tiny_model_dir))
    prompts = [data.encode_prompt(prompt, policy.tokenizer) for prompt in PROMPTS]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    before = [group[0].text for group in rollout.rollout(policy, prompts, greedy)]
    adapter.attach(policy.model, rank=4, alpha=64.0)
    policy.refresh()
    assert [group[0].text for group in rollout.rollout(policy, prompts, greedy)] == before
    for layer in adapter.adapters_of(policy.model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3))
    after = [group[0].text for group in rollout.rollout(policy, prompts, greedy)]
    assert after != before
    with policy.adapter_off():
        assert [group[0].text for group in rollout.rollout(policy, prompts, greedy)] == before


def test_a_penalty_on_repetition_changes_what_is_said_and_not_what_it_is_worth(any_policy):
    asked = Sampling(max_new_tokens=16, temperature=0, repetition_penalty=5.0)
    for group in rollout.rollout(any_policy, TOKENS, asked, rows=2):
        said = group[0].tokens.tolist()
        assert len(set(said)) > len(said) // 2


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("asked", [{}, {"repetition_penalty": 1.3}, {"temperature": 0.0}])
def test_a_step_begun_ahead_gives_the_same_completions(
    arch: str, asked: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    """Rows leave and join on the way, so that steps which were begun ahead are forgotten; equal bit for bit."""
    policy = speaking(monkeypatch, arch)
    monkeypatch.setattr(rollout, "_ends", lambda _: {5, 6, 7, 8})
    prompts = [np.random.default_rng(n).integers(3, 60, n) for n in (5, 9, 3, 14, 2, 8)]
    begun: list[bool] = []
    step, found = decoding.Decoder.step, []
    for ahead in (False, True):

        def stepped(self: decoding.Decoder, ahead: bool = ahead) -> None:
            self.ahead = ahead
            step(self)
            begun.append(self.coming is not None)

        monkeypatch.setattr(decoding.Decoder, "step", stepped)
        sampling = Sampling(max_new_tokens=12, **asked)  # pyright: ignore[reportArgumentType]
        made = rollout.rollout(policy, prompts, sampling, group_size=3, seed=1, rows=8)
        found.append([(one.tokens.tolist(), one.logps.tolist()) for group in made for one in group])
    assert found[0] == found[1]
    assert any(begun)
