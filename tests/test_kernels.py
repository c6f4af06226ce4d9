# SPDX-License-Identifier: Apache-2.0
"""Every fused kernel against its reference, against float64 NumPy and against finite differences, on this device.

Where a kernel is not used (`available()` is False: a GPU has fast forms of its own) its array operations are right too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, base, llama

from mlx_realign import kernels
from mlx_realign.kernels import attention, exp, swiglu, token_scores
from mlx_realign.kernels.token_scores import Head, Weight

Arrays = Sequence[mx.array]


def normal(*shape: int, seed: int = 0, spread: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (spread * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)


def exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_near(found: mx.array, expected: mx.array | np.ndarray, limit: float) -> None:
    """Largest difference relative to the largest entry."""
    right = exact(expected) if isinstance(expected, mx.array) else expected
    gap = np.abs(exact(found) - right).max() / max(np.abs(right).max(), 1e-30)
    assert gap <= limit, gap


def values_and_gradients(function: Callable[..., mx.array], arrays: Arrays, weight: Any = 1.0) -> list[mx.array]:
    """What a function gives, and the gradients of a random weighing of it (times `weight`)."""
    weight = weight * normal(*function(*arrays).shape, seed=99)
    total = lambda *inputs: (function(*inputs).astype(mx.float32) * weight).sum()  # noqa: E731
    return [function(*arrays), *mx.vjp(lambda *x: [total(*x)], list(arrays), [mx.array(1.0)])[1]]


def assert_slopes(function: Callable[..., mx.array], arrays: Arrays, limit: float) -> None:
    """The gradient along three random directions is the five-point difference of the function itself."""
    weight = normal(*function(*arrays).shape, seed=98)
    total = lambda *inputs: (function(*inputs).astype(mx.float32) * weight).sum()  # noqa: E731
    slopes = mx.vjp(lambda *x: [total(*x)], list(arrays), [mx.array(1.0)])[1]
    for trial in range(3):
        ways = [normal(*x.shape, seed=100 * trial + i) for i, x in enumerate(arrays)]
        at = lambda n: total(*(x + 0.02 * n * d for x, d in zip(arrays, ways, strict=True))).item()  # noqa: B023, E731
        difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / 0.24
        slope = sum((exact(g) * exact(d)).sum() for g, d in zip(slopes, ways, strict=True))
        size = sum(np.square(exact(g)).sum() for g in slopes) ** 0.5
        assert slope == pytest.approx(difference, abs=limit * size)


# ---------------------------------------------------------------------------------------------- exp


def test_exp_is_right_between_its_limits():
    x = np.linspace(-44, 44, 100_001).astype(np.float32)
    right = np.exp(x.astype(np.float64))
    error = np.abs(exact(exp.fused(mx.array(x))) / right - 1)
    assert error.max() <= 3e-6
    assert error[np.abs(x) <= 1].max() <= 3e-7
    below = x[x <= 0]
    assert mx.array_equal(exp.fused(mx.array(below), negative=True), exp.fused(mx.array(below)))


def test_exp_clips_and_lets_nan_through():
    found = exact(exp.fused(mx.array([-np.inf, -1e30, -45.0, 0.0, 45.0, np.nan])))
    np.testing.assert_allclose(found[:3], np.exp(-44.0), rtol=1e-5)
    assert found[3] == 1
    assert found[4] == pytest.approx(np.exp(44.0), rel=1e-5)
    assert np.isnan(found[5])
    assert np.isnan(exact(exp.fused(mx.array([np.nan]), negative=True)))


def test_exp_leaves_other_dtypes_to_mlx():
    x = normal(64, dtype=mx.bfloat16)
    assert exp.exp(x).dtype == mx.bfloat16
    assert mx.array_equal(exp.exp(x), mx.exp(x))


# ---------------------------------------------------------------------------------------------- swiglu


@pytest.mark.parametrize("shape", [(7,), (3, 5, 33), (1, 1)])
def test_swiglu_is_its_reference(shape: tuple[int, ...]):
    arrays = (normal(*shape, spread=4), normal(*shape, seed=1, spread=4))
    for found, expected in zip(
        values_and_gradients(swiglu.fused, arrays), values_and_gradients(swiglu.reference, arrays), strict=True
    ):
        assert_near(found, expected, 2e-6)


def test_swiglu_in_float64_and_by_finite_differences():
    gate, x = normal(11, 13, spread=3), normal(11, 13, seed=1)
    g = exact(gate)
    assert_near(swiglu.fused(gate, x), g / (1 + np.exp(-g)) * exact(x), 1e-6)
    assert_slopes(swiglu.fused, (gate, x), 1e-4)


def test_swiglu_far_out():
    """silu goes to 0 on the left and to the gate itself on the right, without overflow or NaN."""
    gate = mx.array([-1e4, -100.0, -50.0, 50.0, 100.0, 1e4])
    ones = mx.ones(gate.shape)
    np.testing.assert_allclose(swiglu.fused(gate, ones), [0, 0, 0, 50, 100, 1e4], atol=1e-14)
    slopes = mx.grad(lambda g: swiglu.fused(g, ones).sum())(gate)
    np.testing.assert_allclose(slopes, [0, 0, 0, 1, 1, 1], atol=1e-14)


def test_swiglu_leaves_other_dtypes_to_the_reference():
    gate, x = normal(9, 5, dtype=mx.bfloat16), normal(9, 5, seed=1, dtype=mx.bfloat16)
    assert swiglu.fused(gate, x).dtype == mx.bfloat16
    assert mx.array_equal(swiglu.fused(gate, x), swiglu.reference(gate, x))


# ---------------------------------------------------------------------------------------------- attention

B, L, S, D = 2, 6, 9, 8
USED = np.ones((B, 1, L, 1), bool)
USED[0, :, 1] = False  # a query that may look at nothing, such as a pad token: nobody uses what it gives


def masks(heads: int) -> dict[str, Any]:
    """Every kind of mask that models pass; True = may look."""
    rng = np.random.default_rng(0)
    seen: Any = rng.random((B, 1, L, S)) < 0.6
    seen[..., 0] = True
    padded = seen & USED
    per_head: Any = rng.random((B, heads, L, S)) < 0.6
    per_head[..., 2] = True
    return {
        "none": None,
        "causal": "causal",
        "bool 2-D": mx.array(seen[0, 0]),
        "bool 4-D": mx.array(seen),
        "bool per head": mx.array(per_head),
        "bool, one for all queries": mx.array(seen[:, :, :1]),
        "fully padded row": mx.array(padded),
        "additive": normal(B, 1, L, S, seed=5),
        "additive with -inf": mx.where(mx.array(seen), 0.0, -mx.inf),
        "additive per head": normal(1, heads, L, S, seed=6),
        "additive, fully padded row": mx.where(mx.array(padded), 0.0, -1e30),
    }


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: Any) -> np.ndarray:
    """In float64, written out: query head h looks at key head h // (heads / key heads)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeats, 1), np.repeat(v, repeats, 1)
    scores = scale * np.einsum("bhld,bhsd->bhls", q, k)
    if isinstance(mask, str):
        mask = np.tril(np.ones((L, S), bool), S - L)
    if mask is not None:
        array = np.array(mask)
        scores = np.where(array, scores, -1e30) if array.dtype == bool else scores + array
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhls,bhsd->bhld", weights / weights.sum(-1, keepdims=True), v)


def qkv(heads: int, shared: int, dtype: mx.Dtype = mx.float32) -> Arrays:
    return (
        normal(B, heads, L, D, spread=2, dtype=dtype),
        normal(B, shared, S, D, seed=1, spread=2, dtype=dtype),
        normal(B, shared, S, D, seed=2, dtype=dtype),
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["equal", "grouped", "one key head"])
@pytest.mark.parametrize("kind", masks(1))
def test_attention_is_its_reference_and_the_formula(kind: str, heads: tuple[int, int]):
    arrays, mask = qkv(*heads), masks(heads[0])[kind]
    fused = lambda *x: attention.fused(*x, scale=0.4, mask=mask)  # noqa: E731
    reference = lambda *x: attention.reference(*x, scale=0.4, mask=mask)  # noqa: E731
    used = mx.array(USED)
    for found, expected in zip(
        values_and_gradients(fused, arrays, used), values_and_gradients(reference, arrays, used), strict=True
    ):
        assert_near(found, expected, 5e-6)
    q, k, v = map(exact, arrays)
    assert_near(fused(*arrays), softmax_attention(q, k, v, 0.4, mask), 2e-6)


def test_a_query_without_keys_stays_finite_in_both_directions():
    for kind in ("fully padded row", "additive, fully padded row"):
        mask = masks(1)[kind]
        for array in values_and_gradients(lambda *x, m=mask: attention.fused(*x, scale=0.4, mask=m), qkv(4, 2)):
            assert np.isfinite(exact(array)).all()


def test_slopes_of_attention_are_those_of_finite_differences():
    mask = masks(4)["bool 4-D"]
    assert_slopes(lambda *x: attention.fused(*x, scale=0.4, mask=mask), qkv(4, 2), 1e-4)


def test_values_of_another_width_than_keys():
    q, k, _ = qkv(4, 2)
    v = normal(B, 2, S, 5, seed=3)
    found = attention.fused(q, k, v, scale=0.4, mask="causal")
    assert_near(found, softmax_attention(exact(q), exact(k), exact(v), 0.4, "causal"), 2e-6)


def test_attention_leaves_decoding_other_dtypes_and_sinks_to_the_reference():
    q, k, v = qkv(4, 2)
    sinks = normal(4)
    for arrays, options in (
        (qkv(4, 2, mx.bfloat16), {"mask": None}),
        ((q[:, :, :1], k, v), {"mask": None}),
        ((q, k, v), {"mask": None, "sinks": sinks}),
    ):
        found = attention.fused(*arrays, scale=0.4, **options)
        assert mx.array_equal(found, attention.reference(*arrays, scale=0.4, **options))


# ---------------------------------------------------------------------------------------------- token scores

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
    expected, found = (f(head, hidden, tokens) for f in (token_scores.reference, token_scores.fused))
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
    rows = token_scores.fused(head, hidden, tokens)
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


def test_no_tokens_no_rows():
    rows = token_scores.fused(dense_head(50), mx.zeros((0, WIDTH)), mx.zeros((0,), mx.int32))
    assert [row.shape for row in rows] == [(0,)] * 3


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


# ---------------------------------------------------------------------------------------------- install


@pytest.fixture
def clean_llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """mlx-lm's llama with its own functions, and kernels not yet checked; all undone afterwards."""
    monkeypatch.setattr(llama, "swiglu", activations.swiglu)
    monkeypatch.setattr(llama, "scaled_dot_product_attention", base.scaled_dot_product_attention)
    for check in (kernels._swiglu, kernels._attention):
        check.cache_clear()
    yield llama
    for check in (kernels._swiglu, kernels._attention):
        check.cache_clear()


on_cpu = pytest.mark.skipif(not swiglu.available(), reason="these kernels are for CPUs")


@on_cpu
def test_install_changes_the_functions_and_not_the_numbers(clean_llama: Any, tiny_model: Callable[..., nn.Module]):
    model = tiny_model("llama")
    tokens = mx.array([[5, 9, 200, 3, 17], [1, 2, 3, 4, 5]])

    def numbers() -> list[mx.array]:
        total = lambda p: (model.update(p), model(tokens).square().mean())[1]  # noqa: E731
        found = [model(tokens), mx.grad(total)(model.parameters())["model"]["embed_tokens"]["weight"]]
        mx.eval(found, model.parameters())
        return found

    start = model.parameters()
    before = numbers()
    model.update(start)
    assert kernels.install(model) == []
    assert clean_llama.swiglu is swiglu.fused
    assert clean_llama.scaled_dot_product_attention is not base.scaled_dot_product_attention
    for found, expected in zip(numbers(), before, strict=True):
        assert_near(found, expected, 5e-6)


def wrong_value(gate: mx.array, x: mx.array) -> mx.array:
    return swiglu.reference(gate, x) * 1.001


@mx.custom_function
def wrong_gradient(gate: mx.array, x: mx.array) -> mx.array:
    return nn.silu(gate) * x


@wrong_gradient.vjp
def _(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
    return cotangent * primals[1], cotangent * nn.silu(primals[0])


def not_finite(gate: mx.array, x: mx.array) -> mx.array:
    return swiglu.reference(gate, x) * mx.array(np.nan)


def raising(gate: mx.array, x: mx.array) -> mx.array:
    raise RuntimeError("no such instruction here")


@on_cpu
@pytest.mark.parametrize("kernel", [wrong_value, wrong_gradient, not_finite, raising], ids=lambda f: "")
def test_a_wrong_kernel_is_not_installed(
    kernel: Any, clean_llama: Any, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(swiglu, "fused", kernel)
    notes = kernels.install(tiny_model("llama"))
    assert len(notes) == 1
    assert notes[0].startswith("kernel swiglu: ")
    assert "the reference is used" in notes[0]
    assert clean_llama.swiglu is activations.swiglu
    assert clean_llama.scaled_dot_product_attention is not base.scaled_dot_product_attention  # the sound one is


@on_cpu
def test_a_wrong_attention_is_not_installed(
    clean_llama: Any, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
):
    blind = lambda q, k, v, *, scale, mask=None, sinks=None: attention.reference(q, k, v, scale=scale)  # noqa: E731
    monkeypatch.setattr(attention, "fused", blind)  # forgets the mask
    (note,) = kernels.install(tiny_model("llama"))
    assert note.startswith("kernel scaled_dot_product_attention: differs from its reference by")
    assert clean_llama.scaled_dot_product_attention is base.scaled_dot_product_attention
