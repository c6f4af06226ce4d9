# SPDX-License-Identifier: Apache-2.0
"""Trials: a slot of one forward pass is the model that the same edits make as an adapter, and touches nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from policy_tools import make_model, make_policy

from mlx_realign import data, taps, writers
from mlx_realign.ablation import edit
from mlx_realign.ablation.kernel import Kernel, Tent
from mlx_realign.ablation.trial import Forced, Job, Runner, Slots, completions
from mlx_realign.policy import Policy
from mlx_realign.vectors import Direction

TEXTS = [Forced([5, 9, 2, 7, 7, 1, 30, 12, 14, 8], 3), Forced([5, 9, 2, 8, 15, 16], 5), Forced([5, 9, 4], 1)]
KERNELS = [
    Kernel({"attention": Tent(1.3, 0.7, 0.2, 1.5), "mlp": Tent(0.8, 1.0, 0.5, 2.0)}),
    Kernel({"attention": Tent(0.9, 1.0, 0.9, 5.0)}, source=0.4),
]


def quantised(arch: str) -> nn.Module:
    model = make_model(arch)
    nn.quantize(model, group_size=32, bits=4)
    return model


def biased() -> nn.Module:
    return make_model("llama", attention_bias=True, mlp_bias=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: make_model("llama"),
    "bias": biased,
    "4-bit": lambda: quantised("llama"),
    "experts": lambda: make_model("qwen3_moe"),
    "4-bit experts": lambda: quantised("qwen3_moe"),
    "post-norm": lambda: make_model("gemma3_text"),
    "no sharing": lambda: make_model("lfm2"),
}


def a_direction(policy: Policy, seed: int = 0) -> Direction:
    width = policy.body.hidden(mx.array([[1]])).shape[-1]
    blocks = len(taps.blocks(policy.model))
    rng = np.random.default_rng(seed)
    return Direction({block: rng.normal(size=width).astype(np.float32) for block in range(blocks)})


def naive(policy: Policy, texts: Sequence[Forced]) -> np.ndarray:
    """Each text alone through the model: log-probs in float64 at the wanted columns."""
    found = []
    for text in texts:
        logits = np.array(policy.model(mx.array([list(text.tokens)]))[0].astype(mx.float32)).astype(np.float64)
        logits = logits[text.first :]
        top = logits.max(-1, keepdims=True)
        found.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return np.concatenate(found)


def joined(pieces: Any) -> np.ndarray:
    return np.concatenate([np.array(piece) for piece in pieces])


@pytest.mark.parametrize("kind", MODELS)
def test_a_slot_is_the_model_that_the_adapter_makes(kind: str):
    policy = make_policy(MODELS[kind](), rank=0, workers=2)
    found, direction = writers.find(policy), a_direction(policy)
    before = naive(policy, TEXTS)
    with Slots(policy, found, 2, direction.width) as slots:
        for slot, kernel in enumerate(KERNELS, 1):
            slots.set(slot, kernel.edits(found, direction))
        got = [joined(slots.logps(slot, TEXTS)) for slot in range(3)]
        assert np.abs(naive(policy, TEXTS) - before).max() < 1e-4, "who asks for no slot gets the policy as it is"
    assert np.abs(got[0] - before).max() < 1e-4
    for slot, kernel in enumerate(KERNELS, 1):
        fresh = make_policy(MODELS[kind](), rank=0)
        edit.put_on(fresh, kernel.edits(found, direction))
        after = naive(fresh, TEXTS)
        assert np.abs(got[slot] - after).max() < 1e-4
        assert np.abs(after - before).max() > 1e-2


def test_leaving_the_context_takes_every_trace_off():
    policy = make_policy("llama", rank=0)
    classes = [type(module) for _, module in policy.model.named_modules()]
    arrays = len(policy.model.state)
    with Slots(policy, writers.find(policy), 2, 64):
        assert len(policy.model.state) == arrays + 1
    assert [type(module) for _, module in policy.model.named_modules()] == classes
    assert len(policy.model.state) == arrays


def test_a_trial_takes_one_direction_only():
    policy = make_policy("llama", rank=0)
    found = writers.find(policy)
    with Slots(policy, found, 1, 64) as slots, pytest.raises(ValueError, match="one direction, not 2"):
        slots.set(1, edit.plan(found, np.eye(64)[:2]))


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return [data.encode_prompt(text, policy.tokenizer) for text in ("Hi", "Tell me of the garden.", "Add 2 and 3!")]


def alone(policy: Policy, prompt: list[int], count: int) -> list[int]:
    """Argmax of the whole forward pass, one token at a time, no cache, no padding."""
    ids, ends = list(prompt), data.stop_ids(policy.tokenizer) | set(policy.tokenizer.eos_token_ids)
    for _ in range(count):
        token = int(np.argmax(np.array(policy.model(mx.array([ids]))[0, -1])))
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_rows_of_different_trials_in_one_batch_say_what_each_model_says_alone(
    policy: Policy, prompts: list[list[int]], tiny_model_dir: Path
):
    found, direction, count = writers.find(policy), a_direction(policy), 12
    expected = {0: [alone(policy, prompt, count) for prompt in prompts]}
    for slot, kernel in enumerate(KERNELS, 1):
        fresh = Policy.load(str(tiny_model_dir))
        edit.put_on(fresh, kernel.edits(found, direction))
        expected[slot] = [alone(fresh, prompt, count) for prompt in prompts]
    assert expected[1] != expected[0] != expected[2]
    with Slots(policy, found, 2, direction.width) as slots:
        for slot, kernel in enumerate(KERNELS, 1):
            slots.set(slot, kernel.edits(found, direction))
        runner, said = Runner(slots, prompts, rows=4), {}  # fewer places than rows: some must wait
        assert len(runner.begun) >= 3, "the template's start is shared"
        for slot in expected:
            for i, prompt in enumerate(prompts):
                runner.add(Job(slot, 0, i), slot, prompt)
        while len(said) < 9:
            for row, _, ended in runner.step():
                if ended or len(row.tokens) == count:
                    row.done = True
                    said[row.tag.trial, row.tag.prompt] = row.tokens[: len(row.tokens) - ended]
        assert {slot: [said[slot, i] for i in range(3)] for slot in expected} == expected
        assert completions(slots, 2, prompts, count) == expected[2]


def test_a_dropped_trial_leaves_at_once(policy: Policy, prompts: list[list[int]]):
    with Slots(policy, writers.find(policy), 2, 64) as slots:
        runner = Runner(slots, prompts, rows=2)
        for trial in (1, 2):
            for i, prompt in enumerate(prompts):
                runner.add(Job(trial, 0, i), trial, prompt)
        assert {row.tag.trial for row, _, _ in runner.step()} == {1}
        runner.drop(1)
        assert not runner.live and {row.tag.trial for row in runner.waiting} == {2}
        assert {row.tag.trial for row, _, _ in runner.step()} == {2}
        assert runner.tokens == 4


def test_completions_of_a_model_that_shares_no_prompts(model_folder: Callable[..., Path]):
    folder = model_folder("lfm2")
    policy = Policy.load(str(folder))
    found, direction = writers.find(policy), a_direction(policy)
    prompts = [data.encode_prompt("Hello", policy.tokenizer)]
    with Slots(policy, found, 1, direction.width) as slots:
        slots.set(1, KERNELS[0].edits(found, direction))
        said = completions(slots, 1, prompts, 6)
    edit.put_on(policy, KERNELS[0].edits(found, direction))
    assert said == [alone(policy, prompts[0], 6)]


def test_a_compiled_step_sees_what_slots_hold_now(policy: Policy, prompts: list[list[int]], monkeypatch: Any):
    found, direction = writers.find(policy), a_direction(policy)

    def said() -> list[list[str]]:
        """Of the same slot with one kernel, then with the other."""
        texts: list[list[str]] = []
        with Slots(policy, found, 1, direction.width) as slots:
            runner = Runner(slots, prompts, rows=4)
            for kernel in KERNELS:
                slots.set(1, kernel.edits(found, direction))
                for i, prompt in enumerate(prompts):
                    runner.add(Job(1, 0, i), 1, prompt)
                own: dict[int, str] = {}
                while len(own) < len(prompts):
                    for row, text, ended in runner.step():
                        if ended or len(row.tokens) == 6:
                            row.done, own[row.tag.prompt] = True, text
                texts.append([own[i] for i in range(len(prompts))])
        return texts

    eager = said()
    monkeypatch.setattr(policy, "compiled", True)
    assert said() == eager and eager[0] != eager[1]
