# SPDX-License-Identifier: Apache-2.0
"""Log-probs from hidden states in slices of the vocabulary, against whole logits, float64 and finite differences."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tf32
from kernel_tools import Arrays, assert_near, assert_slopes, exact, normal, values_and_gradients

from mlx_realign import kernels, noise
from mlx_realign.kernels import scores_proof, token_scores
from mlx_realign.kernels.token_scores import Head, Weight

WIDTH, TOKENS = 32, 300
FLOATS = (mx.float32, mx.bfloat16)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test holds for both forms of the pass; that of a GPU with slices of 2048 columns, as few as it has."""
    if request.param == "gpu":
        pretend(monkeypatch)
        monkeypatch.setattr(token_scores, "proven", set(FLOATS))
        sums_in_float32(monkeypatch)
    yield request.param
    scores_proof.trouble_with.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a GPU, where nothing is proved yet."""
    monkeypatch.setattr(token_scores, "on_cpu", lambda: False)
    monkeypatch.setattr(token_scores, "GPU_SLICE_BYTES", 1)
    monkeypatch.setattr(token_scores, "proven", set())


def sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """mx.fast.cross_entropy and products with packed weights as a GPU has them: on a CPU MLX sums in 16 bits."""
    plain, packed = mx.fast.cross_entropy, mx.quantized_matmul
    wide = lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x  # noqa: E731
    monkeypatch.setattr(mx.fast, "cross_entropy", lambda x, targets: plain(wide(x), targets))
    exactly = lambda x, *given, **named: packed(wide(x), *map(wide, given), **named).astype(x.dtype)  # noqa: E731
    monkeypatch.setattr(mx, "quantized_matmul", exactly)


def dense_head(vocabulary: int, spread: float = 1.0) -> Head:
    weight = normal(vocabulary, WIDTH, seed=7, spread=spread / WIDTH**0.5)
    return Head(lambda h: h @ weight.T.astype(h.dtype), vocabulary, Weight({"weight": weight}, {}))


def quantized_head(vocabulary: int, bits: int = 8, dtype: mx.Dtype = mx.float32) -> Head:
    embedding = nn.Embedding(vocabulary, WIDTH)
    embedding.weight = normal(vocabulary, WIDTH, seed=7, spread=WIDTH**-0.5)
    layer = nn.QuantizedEmbedding.from_embedding(embedding, group_size=32, bits=bits)
    layer.freeze()
    tensors = {name: layer[name] for name in ("weight", "scales", "biases")}
    tensors |= {name: tensors[name].astype(dtype) for name in ("scales", "biases")}
    options = {"group_size": 32, "bits": bits, "mode": layer.mode}
    return Head(lambda h: Weight(tensors, options).logits(h, 0, vocabulary), vocabulary, Weight(tensors, options))


def capped_head(vocabulary: int) -> Head:
    bare = dense_head(vocabulary, spread=3)
    return Head(lambda h: mx.tanh(bare.logits(h) / 2) * 2, vocabulary)


HEADS = {
    "dense": dense_head,
    "quantised": quantized_head,
    "4 bits": lambda vocabulary: quantized_head(vocabulary, 4),
    "soft-capped": capped_head,
}


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


@pytest.mark.parametrize("form", ["gpu"], indirect=True)
def test_compiled_they_are_the_same(form: str):
    head, (hidden, tokens) = dense_head(2504), inputs(2504)

    def total(h: mx.array) -> mx.array:
        return (token_scores.fused(head, h, tokens).logps * h[:, 0]).sum()

    for one, other in zip(mx.compile(mx.value_and_grad(total))(hidden), mx.value_and_grad(total)(hidden), strict=True):
        assert_near(one, other, 2e-6)


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


def test_a_quantised_head_in_bfloat16(form: str):
    """Slopes against those of the same weights in float32; MLX's product on a CPU rounds to bfloat16 as it adds up."""
    head, (hidden, tokens) = quantized_head(5003, 4, mx.bfloat16), inputs(5003, mx.bfloat16)
    assert head.rows is not None
    found, expected = (f(head, hidden, tokens) for f in (token_scores.fused, token_scores.reference))
    for name in ("logps", "entropy"):
        assert_near(getattr(found, name), getattr(expected, name), 5e-3)
    assert mx.array_equal(token_scores.fused(head, hidden, tokens, gradient=False).logps, found.logps)
    weight = head.rows.at(mx.arange(5003)).astype(mx.float32)
    exactly = lambda h: token_scores.reference(Head(lambda x: x @ weight.T, 5003), h, tokens).logps  # noqa: E731
    right = values_and_gradients(exactly, (hidden.astype(mx.float32),))[1]
    slope = values_and_gradients(lambda h: token_scores.fused(head, h, tokens).logps, (hidden,))[1]
    limit = 1e-2 if form == "gpu" else 0.1
    assert np.linalg.norm(exact(slope) - exact(right)) < limit * np.linalg.norm(exact(right))


@pytest.mark.parametrize("form", ["gpu"], indirect=True)
@pytest.mark.parametrize("vocabulary", [1000, 5003])
def test_slopes_of_sure_tokens_in_bfloat16(vocabulary: int, form: str):
    """Of a token of probability 0.99 little is left, W[token] less nearly W[token]: against float64, same logits."""
    weight = normal(vocabulary, 64, seed=7, dtype=mx.bfloat16)
    tokens = mx.random.randint(0, vocabulary, (TOKENS,), key=mx.random.key(3))
    hidden = (0.24 * weight[tokens] + normal(TOKENS, 64, spread=0.1)).astype(mx.bfloat16)
    logits, index = exact(hidden @ weight.T), (np.arange(TOKENS), np.array(tokens))
    off = np.exp(logits - logits.max(-1, keepdims=True))
    off /= -off.sum(-1, keepdims=True)
    assert 0.98 < np.median(-off[index]) < 0.999
    off[index] = -(off.sum(-1) - off[index])  # the others' sum, not 1 less what is nearly 1
    right = off @ exact(weight)
    head = Head(lambda h: h @ weight.T, vocabulary, Weight({"weight": weight}, {}))
    slope = mx.grad(lambda h: token_scores.fused(head, h, tokens).logps.sum())(hidden)
    errors = np.linalg.norm(exact(slope) - right, axis=1) / np.linalg.norm(right, axis=1)
    assert np.median(errors) < 1e-2


# ------------------------------------------------------------------ a GPU's form proves itself


class Dtypes(nn.Module):
    """Stands for a model with weights of some dtypes."""

    def __init__(self, *dtypes: mx.Dtype) -> None:
        super().__init__()
        self.weights = [mx.zeros((1,), dtype) for dtype in dtypes]


def test_on_a_cpu_nothing_is_proved_and_a_gpu_takes_its_form_only_when_it_is(
    form: str, monkeypatch: pytest.MonkeyPatch
):
    taken: list[str] = []
    for name in ("narrow", "_online"):
        one = getattr(token_scores, name)
        call = lambda *given, name=name, one=one, **named: (taken.append(name), one(*given, **named))[1]  # noqa: E731
        monkeypatch.setattr(token_scores, name, call)
    monkeypatch.setattr(token_scores, "proven", set())
    head, (hidden, tokens) = dense_head(50), inputs(50)
    token_scores.fused(head, hidden, tokens)
    assert scores_proof.run(Dtypes(*FLOATS, mx.uint32)) == []
    token_scores.fused(head, hidden, tokens)
    assert token_scores.proven == (set(FLOATS) if form == "gpu" else set())
    assert (taken[0], taken[-1]) == ("_online", "narrow" if form == "gpu" else "_online")


def longer(rows: list[mx.array]) -> list[mx.array]:
    return [*rows[:4], 1.2 * rows[4]]


def last_of_equals(rows: list[mx.array]) -> list[mx.array]:
    return [rows[0], rows[1], 0 * rows[2], *rows[3:]]


def squares_off(rows: list[mx.array]) -> list[mx.array]:
    return [*rows[:3], rows[3] + 0.01, rows[4]]


@pytest.mark.parametrize("form", ["cpu"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "said"), [(longer, "the gradient of a"), (last_of_equals, "correct of a"), (squares_off, "log_sum_sq of")]
)
def test_a_form_that_is_wrong_is_not_used_and_a_line_says_so(
    fault: Callable[..., list[mx.array]], said: str, form: str, monkeypatch: pytest.MonkeyPatch
):
    pretend(monkeypatch)
    right = token_scores.narrow
    monkeypatch.setattr(token_scores, "narrow", lambda *given, **named: fault(right(*given, **named)))
    switch = kernels.install(Dtypes(mx.float32))
    switch.close()
    assert [note for note in switch.notes if said in note and "float32" in note and "are used" in note], switch.notes
    head, (hidden, tokens) = dense_head(5003), inputs(5003)
    slopes = [
        values_and_gradients(lambda h, f=f: f(head, h, tokens).logps, (hidden,))[1]
        for f in (token_scores.fused, token_scores.reference)
    ]
    assert_near(slopes[0], slopes[1], 1e-5)


@pytest.mark.parametrize("form", ["cpu"], indirect=True)
def test_sums_in_bfloat16_are_found(form: str, monkeypatch: pytest.MonkeyPatch):
    """Here they are those of MLX on a CPU, where `mx.fast.cross_entropy` has no kernel."""
    pretend(monkeypatch)
    (line,) = scores_proof.run(Dtypes(*FLOATS))
    assert line.startswith("kernel token_scores, bfloat16: logps of a dense head differs") and "slices in" in line
    assert token_scores.proven == {mx.float32}


@pytest.mark.parametrize("form", ["gpu"], indirect=True)
def test_products_of_10_bits_pass_and_a_wrong_gradient_does_not(form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(noise, "short_products", lambda: True)
    with tf32.simulated():
        assert scores_proof.trouble_with(mx.float32) is None
    right = token_scores.narrow
    monkeypatch.setattr(token_scores, "narrow", lambda *given, **named: longer(right(*given, **named)))
    scores_proof.trouble_with.cache_clear()
    with tf32.simulated():
        assert "gradient" in str(scores_proof.trouble_with(mx.float32))
