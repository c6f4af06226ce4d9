# SPDX-License-Identifier: Apache-2.0
"""rollout: many prompts of unequal length at once give what each gives alone."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import data, rollout
from mlx_realign.policy import Policy

PROMPTS = ["Hi", "Tell me about the garden.", "Add 27 and 35, please, and then say so.", "?"]


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


@pytest.mark.parametrize("batch_size", [2, 64])
def test_greedy_completions_together_equal_each_alone(policy, batch_size):
    together = rollout.complete(policy, PROMPTS, max_new_tokens=10, batch_size=batch_size)
    assert together == [alone(policy, prompt, 10) for prompt in PROMPTS]


def test_sampling_is_repeatable_with_a_seed_and_differs_from_greedy(policy):
    draws = [rollout.complete(policy, PROMPTS, max_new_tokens=10, temperature=1.0, seed=5) for _ in range(2)]
    assert draws[0] == draws[1] != rollout.complete(policy, PROMPTS, max_new_tokens=10)
