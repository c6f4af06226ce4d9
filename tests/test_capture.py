# SPDX-License-Identifier: Apache-2.0
"""Captured states equal those of a plain forward pass of each text alone, block by block."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCAB_SIZE
from policy_tools import ALL, SHARING, make_policy

from mlx_realign import capture, taps
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

START = [7, 3, 9]  # what all texts begin with


def texts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [START + rng.integers(3, VOCAB_SIZE - 1, n).tolist() for n in (4, 11, 2, 20, 7)]


def alone(policy: Policy, text: list[int]) -> np.ndarray:
    """[blocks + 1, T, D]: input of block 0 and output of every block, text by itself."""
    found: list[mx.array] = []
    paths = taps.blocks(policy.model)
    keep = lambda x, _: (found.append(x), x)[1]  # noqa: E731
    handles = [taps.put(policy.model, paths[0], keep, before=True)]
    handles += [taps.put(policy.model, path, keep) for path in paths]
    policy.model(mx.array([text]))
    for handle in handles:
        handle.remove()
    return np.array(mx.concatenate(found).astype(mx.float32))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("arch", ALL)
def test_states_are_those_of_each_text_alone(arch, workers):
    policy = make_policy(arch, workers=workers)
    policy.sharing = arch in SHARING
    rows = texts()
    found = capture.collect(policy, rows, positions=(-1, -3), at_once=30)
    assert found.dtype == np.float32
    for text, states in zip(rows, found, strict=True):
        wanted = alone(policy, text)[:, [-1, -3]]
        np.testing.assert_allclose(states, wanted, atol=2e-4 * np.abs(wanted).max())


def test_only_the_blocks_asked_for_and_means_over_prompts():
    policy, rows = make_policy("llama"), texts(1)
    every = capture.collect(policy, rows)
    some = capture.collect(policy, rows, blocks=[1, -1])
    np.testing.assert_allclose(some[:, 0], every[:, 2], atol=1e-4)
    np.testing.assert_allclose(some[:, 1], every[:, 0], atol=1e-4)
    mean = capture.means(policy, rows, at_once=16)
    assert mean.dtype == np.float64
    np.testing.assert_allclose(mean, every.astype(np.float64).mean(0), atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "lfm2"])
def test_completion_means_are_over_the_completion_only(arch):
    policy = make_policy(arch)
    policy.sharing = arch in SHARING
    prompts, completions = texts(2), [[4, 8, 15], [16], [23, 42 % VOCAB_SIZE, 5, 6], [9, 9], [3]]
    found = capture.completion_means(policy, prompts, completions, at_once=40)
    for prompt, completion, mean in zip(prompts, completions, found, strict=True):
        wanted = alone(policy, prompt + completion)[:, len(prompt) :].astype(np.float64).mean(1)
        np.testing.assert_allclose(mean, wanted, atol=2e-4 * np.abs(wanted).max())


def test_means_in_a_bfloat16_model_do_not_accumulate_in_bfloat16():
    policy = make_policy("llama", rank=0)
    policy.model.set_dtype(mx.bfloat16)
    rows = [row for seed in range(40) for row in texts(seed)]
    every = capture.collect(policy, rows)
    np.testing.assert_allclose(capture.means(policy, rows), every.astype(np.float64).mean(0), rtol=1e-6, atol=1e-7)


def test_taps_are_told_where_prompts_end():
    """Shared start or not: the last prompt token is each prompt's own, and no token of the start is it."""
    policy, rows = make_policy("llama", rank=0), texts(3)
    ends: list[int] = []

    def look(x: mx.array, place: taps.Place) -> mx.array:
        last = place.last_prompt()
        assert last is not None
        here = np.array(place.positions(x.shape[1]) == last[:, None])
        ends.extend(np.argwhere(here)[:, 1].tolist())
        return x

    handle = taps.put(policy.model, "model.layers.1", look)
    for policy.sharing in (True, False):
        ends.clear()
        capture.collect(policy, rows)
        shift = len(START) if policy.sharing else 0
        assert sorted(ends) == sorted(len(row) - 1 - shift for row in rows)
    handle.remove()


def test_the_common_start_of_completions_is_found():
    policy = Policy.load("tiny-chat")
    prompts = [f"What is the {thing} of Zarnia?" for thing in ("capital", "animal", "colour")]
    prefix = capture.response_prefix(policy, ["What is 12 + 13?"] * 4, max_new_tokens=8)
    assert policy.tokenizer.decode(prefix).startswith("12 + 13")
    assert capture.response_prefix(policy, ["What is 12 + 13?", "What is 45 + 22?", *prompts]) == []
    encoded = capture.encode(policy, ["What is 12 + 13?"], prefix=prefix)[0]
    assert encoded[-len(prefix) :] == prefix


@pytest.mark.parametrize(("positives", "negatives"), [(20, 20), (60, 15), (15, 60)])
def test_what_one_set_alone_begins_with_is_no_prefix(positives, negatives):
    """All of one set are sums of 12 + 13, whose replies begin alike; the other set's do not."""
    policy = Policy.load("tiny-chat")
    alike = ["What is 12 + 13?"] * positives
    others = [f"What is the capital of {name}?" for name in ("Zarnia", "Bolonia", "Nowhere")] * (negatives // 3)
    assert capture.response_prefix(policy, alike, others) == []
    assert capture.response_prefix(policy, others, alike) == []
    both = capture.response_prefix(policy, alike, ["How much is 12 + 13?"] * negatives, max_new_tokens=6)
    assert policy.tokenizer.decode(both).startswith("12 + ")


def test_what_cannot_be_read_is_told():
    policy = make_policy("llama")
    with pytest.raises(UserError, match="position 0"):
        capture.collect(policy, texts(), positions=(0,))
    with pytest.raises(UserError, match="prompt 3 has 5 tokens"):
        capture.collect(policy, texts(), positions=(-6,))
    with pytest.raises(UserError, match="block 9"):
        capture.collect(policy, texts(), blocks=[9])
    with pytest.raises(UserError, match="completion 2 is empty"):
        capture.completion_means(policy, texts()[:2], [[1], []])
    with pytest.raises(UserError, match="no prompts"):
        capture.collect(policy, [])
