# SPDX-License-Identifier: Apache-2.0
"""Experts that are a module each: sorted and dense equal mlx-lm's loops; a trace takes the dense form."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import dbrx
from odd_models import odd_model
from policy_tools import gap, make_batch, make_policy, weighed

from mlx_realign import compiled, selfcheck
from mlx_realign.kernels import experts
from mlx_realign.kernels.switch import Switch

FORMS = {"sorted": experts.by_expert, "dense": experts.dense}


def block(count: int = 6) -> Any:
    sizes = {"ffn_hidden_size": 16, "moe_num_experts": count, "moe_top_k": 2}
    mx.random.seed(4)
    return dbrx.SparseMoeBlock(dbrx.ModelArgs("dbrx", 0, 8, sizes, {}, 1, 1))


def values_and_gradients(one: Any, run: Any, x: mx.array) -> list[mx.array]:
    """Of the tokens and of every weight, by name."""
    start, weight = one.parameters(), mx.random.normal(x.shape, key=mx.random.key(1))

    def loss(parameters: Any, x: mx.array) -> mx.array:
        one.update(parameters)
        return (run(x) * weight).sum()

    slopes, of_x = mx.grad(loss, argnums=(0, 1))(start, x)
    one.update(start)
    return [run(x), of_x, *(slope for _, slope in sorted(tree_flatten(slopes)))]  # type: ignore[misc]


@pytest.mark.parametrize("training", [False, True], ids=["token by token", "by expert"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_both_loops_of_mlx_lm(form: str, tokens: int, training: bool):
    one, x = block(), mx.random.normal((1, tokens, 8), key=mx.random.key(0))
    expected = values_and_gradients(one.train(training), one, x)

    def ours(x: mx.array) -> mx.array:
        return FORMS[form](one.experts, x[0], *experts.routed(one, x[0]))[None]

    found = values_and_gradients(one, ours, x)
    assert len(found) == 2 + 1 + 3 * 6
    assert tokens > 1 or sum(not mx.any(slope).item() for slope in expected) == 4 * 3  # experts without a token
    for mine, theirs in zip(found, expected, strict=True):
        assert float(mx.abs(mine - theirs).max()) <= 1e-5 * max(1e-3, float(mx.abs(theirs).max()))


def test_an_expert_that_a_token_would_take_too_far_is_not_asked():
    """In float16 the second expert makes infinity of the first token, which is not routed to it."""
    grow = [lambda x: x, lambda x: x * x]
    x = mx.array([[3e4, 0], [0, 2.0]], mx.float16)
    scores, chosen = mx.array([[1.0], [0.5]], mx.float16), mx.array([[0], [1]])
    total = lambda x: experts.dense(grow, x, scores, chosen).sum()  # noqa: E731
    assert experts.dense(grow, x, scores, chosen).tolist() == [[3e4, 0], [0, 2]]
    assert mx.grad(total)(x).tolist() == [[1, 1], [0, 2]]


def test_a_method_is_exchanged_in_the_modules_of_one_model_and_put_back():
    switch, one, other = Switch(), block(), block()
    switch.put(dbrx.SparseMoeBlock.__call__, lambda self, x: x + self.num_experts)
    switch.take(one)
    assert one(mx.array(1.0)).item() == 7
    assert type(other) is dbrx.SparseMoeBlock
    switch.close()
    assert type(one) is dbrx.SparseMoeBlock


def test_steps_of_dbrx_are_compiled_and_equal_eager_ones(monkeypatch: pytest.MonkeyPatch):
    policy = make_policy(odd_model("dbrx"))
    batch, loss = make_batch(), weighed()
    expected = policy.gradients(batch, loss)
    policy.compile()
    assert selfcheck.run(policy).notes == []
    found = policy.gradients(batch, loss)
    assert policy.compiled
    assert float(found[0].total) == pytest.approx(float(expected[0].total), rel=1e-5)
    assert gap(found[1], expected[1]) <= 1e-5
    monkeypatch.setattr(experts, "MOST", 0.0)  # where tokens that are not an expert's would take too long
    policy.compile()
    again = policy.gradients(batch, loss)
    assert (policy.compiled, policy.notes[-1]) == (False, compiled.NOTE)
    assert gap(again[1], expected[1]) == 0
    policy.close()


def test_decoding_calls_no_expert_that_no_token_takes():
    one, called = block(), []
    kinds = [lambda x, e=e: (called.append((e, x.shape)), one.experts[e](x))[1] for e in range(6)]
    x = mx.random.normal((3, 8), key=mx.random.key(0))
    scores, chosen = experts.routed(one, x)
    experts.by_expert(kinds, x, scores, chosen)
    counts = np.bincount(np.array(chosen).ravel(), minlength=6)
    assert called == [(e, (n, 8)) for e, n in enumerate(counts.tolist()) if n]
