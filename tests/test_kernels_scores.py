# SPDX-License-Identifier: Apache-2.0
"""Log-probs from hidden states in slices of the vocabulary, against whole logits, float64 and finite differences."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_tools import Arrays, assert_near, assert_slopes, exact, normal, values_and_gradients

from mlx_realign.kernels import token_scores
from mlx_realign.kernels.token_scores import Head, Weight

WIDTH, TOKENS = 32, 300


def dense_head(vocabulary: int, spread: float = 1.0) -> Head:
    weight = normal(vocabulary, WIDTH, seed=7, spread=spread / WIDTH**0.5)
    return Head(lambda h: h @ weight.T.astype(h.dtype), vocabulary, Weight({"weight": weight}, {}))


def quantized_head(vocabulary: int) -> Head:
    layer = nn.QuantizedEmbedding.from_embedding(nn.Embedding(vocabulary, WIDTH), group_size=32, bits=8)
    layer.freeze()
    tensors = {name: layer[name] for name in ("weight", "scales", "biases")}
    return Head(layer.as_linear, vocabulary, Weight(tensors, {"group_size": 32, "bits": 8, "mode": layer.mode}))


def capped_head(vocabulary: int) -> Head:
    bare = dense_head(vocabulary, spread=3)
    return Head(lambda h: mx.tanh(bare.logits(h) / 2) * 2, vocabulary)


HEADS = {"dense": dense_head, "quantised": quantized_head, "soft-capped": capped_head}


def inputs(vocabulary: int, dtype: mx.Dtype = mx.float32) -> Arrays:
    tokens = mx.random.randint(0, vocabulary, (TOKENS,), key=mx.random.key(3))
    tokens[:2] = mx.array([0, vocabulary - 1])
    return normal(TOKENS, WIDTH, dtype=dtype), tokens


@pytest.mark.parametrize("vocabulary", [50, 2048, 5003], ids=["one slice", "exactly one slice", "ragged slices"])
@pytest.mark.parametrize("kind", HEADS)
def test_token_scores_are_their_reference(kind: str, vocabulary: int):
    head, (hidden, tokens) = HEADS[kind](vocabulary), inputs(vocabulary)
    expected, found = (
        token_scores.reference(head, hidden, tokens),
        token_scores.fused(head, hidden, tokens, squares=True),
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == mx.float32
        assert_near(one, other, 1e-5)
    slopes = [
        values_and_gradients(lambda h, f=f: f(head, h, tokens).logps, (hidden,))[1]
        for f in (token_scores.fused, token_scores.reference)
    ]
    assert_near(slopes[0], slopes[1], 1e-5)


def test_token_scores_in_float64_and_by_finite_differences():
    head, (hidden, tokens) = dense_head(5003, spread=4), inputs(5003)
    assert head.rows is not None
    logits = exact(hidden) @ exact(head.rows.tensors["weight"]).T
    every = logits - logits.max(-1, keepdims=True)
    every -= np.log(np.exp(every).sum(-1, keepdims=True))
    rows = token_scores.fused(head, hidden, tokens, squares=True)
    assert_near(rows.log_sum_sq, np.log(np.exp(2 * every).sum(-1)), 1e-5)
    assert_near(rows.logps, every[np.arange(TOKENS), np.array(tokens)], 1e-6)
    assert_near(rows.entropy, -(np.exp(every) * every).sum(-1), 5e-5)
    assert rows.correct.tolist() == (every.argmax(-1) == np.array(tokens)).tolist()
    assert_slopes(lambda h: token_scores.fused(head, h, tokens).logps, (hidden,), 1e-4)


def test_no_gradient_flows_through_entropy_and_hits():
    head, (hidden, tokens) = dense_head(500), inputs(500)
    for f in (token_scores.fused, token_scores.reference):
        slope = mx.grad(lambda h, f=f: (f(head, h, tokens).entropy + f(head, h, tokens).correct).sum())(hidden)
        assert not mx.any(slope).item()


def test_logits_far_apart():
    """A later slice whose logits are hundreds above those before must not overflow what was summed, nor the reverse."""
    vocabulary = 5003
    steep = mx.arange(vocabulary)[:, None] * (0.2 / WIDTH) * mx.ones((1, WIDTH))
    for weight in (steep, steep[::-1]):
        head = Head(lambda h, w=weight: h @ w.T, vocabulary, Weight({"weight": weight}, {}))
        hidden, tokens = mx.ones((TOKENS, WIDTH)), inputs(vocabulary)[1]
        found, expected = (f(head, hidden, tokens) for f in (token_scores.fused, token_scores.reference))
        assert exact(expected.logps).min() < -900
        assert_near(found.logps, expected.logps, 1e-6)
        assert_near(found.entropy, expected.entropy, 1e-4)


def test_token_scores_in_bfloat16():
    """Both compute logits in bfloat16 and the rest in float32; slices may sum a logit in another order."""
    weight = normal(5003, WIDTH, seed=7, spread=WIDTH**-0.5, dtype=mx.bfloat16)
    head = Head(lambda h: h @ weight.T, 5003, Weight({"weight": weight}, {}))
    hidden, tokens = inputs(5003, mx.bfloat16)
    found, expected = (f(head, hidden, tokens) for f in (token_scores.fused, token_scores.reference))
    assert found.logps.dtype == mx.float32
    assert_near(found.logps, expected.logps, 5e-3)
    slopes = [
        values_and_gradients(lambda h, f=f: f(head, h, tokens).logps, (hidden,))[1]
        for f in (token_scores.fused, token_scores.reference)
    ]
    assert slopes[0].dtype == mx.bfloat16
    assert_near(slopes[0], slopes[1], 2e-2)


def test_hits_are_the_first_of_equal_logits_as_argmax_takes_them():
    """bfloat16 logits are often equal; a token is a hit only if argmax would pick it."""
    weight = mx.zeros((3000, WIDTH))
    weight[1], weight[2500] = 1.0, 1.0
    head = Head(lambda h: h @ weight.T, 3000, Weight({"weight": weight}, {}))
    tokens = mx.array([1, 2500] * 150)
    for f in (token_scores.fused, token_scores.reference):
        assert f(head, mx.ones((TOKENS, WIDTH)), tokens).correct.tolist() == [1, 0] * 150


def test_a_trained_head_gets_its_gradient():
    layer = nn.Linear(WIDTH, 5003)
    hidden, tokens = inputs(5003)

    def slopes(f: Callable[..., Any]) -> Any:
        def total(parameters: dict[str, Any], h: mx.array) -> mx.array:
            layer.update(parameters)
            return f(Head(layer, 5003, None, layer), h, tokens).logps.sum()

        before = layer.parameters()
        found = mx.grad(total, argnums=(0, 1))(before, hidden)
        layer.update(before)
        return found

    (ours, ours_hidden), (right, right_hidden) = slopes(token_scores.fused), slopes(token_scores.reference)
    assert_near(ours_hidden, right_hidden, 1e-5)
    for name in ("weight", "bias"):
        assert_near(ours[name], right[name], 1e-5)


def test_without_a_gradient_the_scores_are_the_same():
    head, (hidden, tokens) = dense_head(5003), inputs(5003)
    with_slope, without = (token_scores.fused(head, hidden, tokens, gradient=g) for g in (True, False))
    for one, other in zip(with_slope, without, strict=True):
        assert mx.array_equal(one, other)


def test_without_a_gradient_it_cannot_be_asked_for():
    head, (hidden, tokens) = dense_head(50), inputs(50)
    with pytest.raises(RuntimeError, match="gradient=False"):
        mx.grad(lambda h: token_scores.fused(head, h, tokens, gradient=False).logps.sum())(hidden)


def test_no_tokens_no_rows():
    rows = token_scores.fused(dense_head(50), mx.zeros((0, WIDTH)), mx.zeros((0,), mx.int32))
    assert [row.shape for row in rows] == [(0,)] * 4


def test_the_whole_logits_never_exist():
    """256 tokens by 65536 logits are 67 MB; a gradient through the fused head needs much less."""
    weight = normal(65536, 16, seed=7)
    head = Head(lambda h: h @ weight.T, 65536, Weight({"weight": weight}, {}))
    hidden, tokens = normal(256, 16), mx.random.randint(0, 65536, (256,))
    mx.eval(weight, hidden, tokens)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(lambda h: token_scores.fused(head, h, tokens).logps.sum())(hidden))
    assert mx.get_peak_memory() - before < 40e6
