# SPDX-License-Identifier: Apache-2.0
"""What a loaded model is checked against is mlx-lm's own: what is planted in our kernels is found, whatever it is."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from policy_tools import Numbers, gap, make_batch, make_examples, make_model, make_policy, naive_logps, weighed
from reference_tools import own_model, stock_gradient

from mlx_realign import adapter_layers, data, forward, kernels, prompt_caches, rollout, selfcheck, selfcheck_reference
from mlx_realign.batch import Completion, Example
from mlx_realign.errors import UserError
from mlx_realign.kernels import attention
from mlx_realign.policy import Policy
from mlx_realign.sampling import Sampling

EXAMPLES = make_examples([(14, [5, 9]), (3, [6, 1]), (14, [4])])


def every_weight_trained(model: nn.Module) -> Policy:
    policy = make_policy(model, rank=0)
    policy.model.unfreeze()
    policy.refresh()
    return policy


def planted(monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    """Attention without a gradient to one of its arrays, past the check of kernels by themselves."""

    def wrong(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None) -> mx.array:
        given = {"q": q, "k": k, "v": v, "mask": mask}
        if isinstance(given[stopped], mx.array):
            given[stopped] = mx.stop_gradient(given[stopped])
        q, k, v, mask = given.values()
        return attention.reference(q, k, v, scale=scale, mask=mask, sinks=sinks)

    monkeypatch.setattr(kernels, "_attention", lambda: (wrong, None))


@pytest.mark.parametrize(("arch", "stopped"), [("llama", "q"), ("llama", "v"), ("deepseek_v3", "mask")])
def test_a_kernel_that_drops_a_gradient_is_found_at_load(arch: str, stopped: str, monkeypatch: pytest.MonkeyPatch):
    planted(monkeypatch, stopped)
    make = (lambda: own_model(arch)) if arch == "deepseek_v3" else (lambda: make_model(arch))
    policy, batch = every_weight_trained(make()), data.collate(EXAMPLES)
    stock = stock_gradient(make(), EXAMPLES)
    assert gap(policy.gradients(batch, weighed())[1], stock) > 1e-2
    checks = selfcheck.run(policy)
    assert not policy.kernels.on
    (note,) = checks.notes
    assert note.startswith("our kernels are off, mlx-lm's own functions run instead: the gradient of ")
    assert "\n" not in note
    assert checks.results["kernels"].startswith("off: ")
    assert policy.sharing
    assert gap(policy.gradients(batch, weighed())[1], stock) <= 1e-4
    monkeypatch.undo()
    sound = every_weight_trained(make())
    assert selfcheck.run(sound).notes == []
    assert sound.kernels.on


@pytest.mark.parametrize("sharing", [True, False])
def test_latent_attention_gets_the_gradient_of_mlx_lm(sharing: bool):
    policy = every_weight_trained(own_model("deepseek_v3"))
    policy.sharing = sharing
    expected = stock_gradient(own_model("deepseek_v3"), EXAMPLES)
    assert gap(policy.gradients(data.collate(EXAMPLES), weighed())[1], expected) <= 1e-4


def test_a_gradient_by_hand_that_is_wrong_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    """There is no other way through an adapter layer."""
    right = adapter_layers._fused
    monkeypatch.setattr(adapter_layers, "_fused", lambda linear, x, a, b: right(linear, x, mx.stop_gradient(a), b))
    with pytest.raises(UserError, match="^--model tiny: .*cannot be trained here: rows of a batch are not.*lora_a"):
        selfcheck.run(make_policy("llama"))


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_the_reference_is_the_model_alone_and_takes_none_of_our_ways(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    policy = make_policy("qwen2", moved=False, **options)
    batch = selfcheck.probe(policy.vocabulary)
    with selfcheck_reference.nudged(policy.model):
        rows = [np.array(batch.prompt)[p, np.array(batch.prompt_pad)[p] :] for p in np.array(batch.row_prompt)]
        tokens = [row[mask] for row, mask in zip(np.array(batch.completion), np.array(batch.mask), strict=True)]
        alone = [
            Example(p, (Completion(t, np.ones(len(t), bool)),), 0, "", {}) for p, t in zip(rows, tokens, strict=True)
        ]
        expected = naive_logps(policy.model, alone)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    for module, name in ((forward, "shared"), (forward, "plain"), (adapter_layers, "_fused")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(attention, "fused", never)
    found, note = selfcheck_reference.by_mlx_lm(policy, batch)
    assert note is None
    assert len(found) > 20
    for row, right in zip(np.array(found["log-probs"]), expected, strict=True):
        np.testing.assert_allclose(row[: len(right)], right, atol=2e-5)


def test_gradients_that_would_take_long_are_left_out_and_it_is_said(monkeypatch: pytest.MonkeyPatch):
    """Values are compared all the same, and gradients with those of rows side by side."""
    monkeypatch.setattr(selfcheck_reference, "SECONDS", 0.0)
    policy = make_policy("llama")
    checks = selfcheck.run(policy)
    assert len(checks.notes) == 1
    assert checks.notes[0].startswith("gradients were not compared with mlx-lm's own, which would take ")
    assert policy.sharing
    right = prompt_caches.PromptReader.__init__

    def no_gradient_to_prompts(self: Any, *args: Any) -> None:
        right(self, *args)
        self.kv = tuple(mx.stop_gradient(x) for x in self.kv)

    monkeypatch.setattr(prompt_caches.PromptReader, "__init__", no_gradient_to_prompts)
    selfcheck.run(policy)
    assert not policy.sharing
    policy.model.update({"model": {"norm": {"weight": mx.full((64,), np.inf)}}})
    with pytest.raises(UserError, match="not finite"):
        selfcheck.run(policy)


class Dropping(nn.Module):
    """A model with dropout in front of its head, and a note of how it was run."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.drop, self.seen = inner, nn.Dropout(0.5), []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.seen.append((self.training, self.drop.training))
        return self.inner.lm_head(self.drop(self.inner.model(tokens, cache)))

    @property
    def layers(self) -> Any:
        return self.inner.layers


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_in_training_mode_without_dropout_and_the_mode_comes_back(training: bool):
    model = Dropping(make_model("qwen2"))
    policy = make_policy(model)
    policy.model.train(training)
    before = [m.training for m in policy.model.modules()]
    model.seen.clear()
    selfcheck_reference.by_mlx_lm(policy, selfcheck.probe(policy.vocabulary))
    assert set(model.seen) == {(True, False)}
    assert [m.training for m in policy.model.modules()] == before
    policy.model.eval()
    assert selfcheck.run(policy).notes == []


# ---------------------------------------------------------------------------------------------- even prompts


def test_a_model_that_cannot_have_padding_shares_prompts_of_one_length():
    policy = every_weight_trained(own_model("ministral3"))
    (note,) = selfcheck.run(policy).notes
    assert note.startswith("only prompts of one length are computed together, which takes more time: ")
    assert policy.sharing
    assert policy.even
    examples = make_examples([(14, [5, 9]), (3, [12, 1, 6]), (1, [4]), (14, [7]), (1, [2, 3]), (30, [4])])
    batch = data.collate(examples)
    logps = np.array(policy.scores(batch).logps)
    for found, expected in zip(logps, naive_logps(own_model("ministral3"), examples), strict=True):
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)
    expected = stock_gradient(own_model("ministral3"), examples)
    assert gap(policy.gradients(batch, weighed())[1], expected) <= 1e-4
    policy.compile()
    assert gap(policy.gradients(batch, weighed())[1], expected) <= 1e-4
    forward.checkpoint_layers(policy.model)
    assert gap(policy.gradients(batch, weighed())[1], expected) <= 1e-4


@pytest.mark.parametrize("workers", [1, 2])
def test_even_prompts_give_what_padded_ones_give(workers: int):
    """Prompt log-probs included, on a model that takes either."""
    policy, batch = (
        make_policy("qwen3", workers=workers),
        make_batch([(9, [5, 2]), (4, [3]), (9, [1]), (1, [6]), (4, [2])]),
    )
    policy.needs = frozenset({"prompt_logps"})
    found = {}
    for policy.even in (False, True):
        scores = policy.scores(batch)
        found[policy.even] = [scores.logps, scores.prompt_logps, policy.gradients(batch, weighed())[1]]
        mx.eval(found)
    for x, y in zip(found[True][:2], found[False][:2], strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    assert gap(found[True][2], found[False][2]) <= 1e-4


def test_rollouts_of_a_model_that_cannot_have_padding(monkeypatch: pytest.MonkeyPatch):
    """Rows that leave and prompts that join, one of them of a single token: what mlx-lm says of the same text."""
    policy = every_weight_trained(own_model("ministral3"))
    policy.even = True
    policy.tokenizer = Numbers()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(data, "stop_ids", lambda _: {0})
    prompts = [list(range(5, 5 + n)) for n in (9, 1, 30, 9, 4)]
    groups = rollout.rollout(policy, prompts, Sampling(max_new_tokens=10), group_size=2, seed=4, rows=4)
    stock = own_model("ministral3")
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            whole = (Completion(one.tokens, np.ones(len(one.tokens), bool)),)
            (expected,) = naive_logps(stock, [Example(np.array(prompt, np.int32), whole, 0, "", {})])
            np.testing.assert_allclose(one.logps, expected, atol=1e-4)


def test_the_tokens_of_even_prompts_count_as_those_of_padded_ones():
    batch = make_batch()
    weights = forward.token_weights(batch, True, True)
    assert len(weights) == 2 * 3 + 1  # a prompt of one token is a pass of its own, with its completions
    total = sum(float(np.array(w.sum())) for w in weights)
    assert total == sum(float(np.array(w.sum())) for w in forward.token_weights(batch, True))
    states: list[tuple[int, ...]] = []
    policy = make_policy("llama")
    hidden = lambda tokens, cache=None: (states.append(tokens.shape), policy.body.hidden(tokens, cache))[1]  # noqa: E731
    forward.even(policy.model, hidden, batch)
    assert [w.size for w in weights] == [rows * columns for rows, columns in states]
