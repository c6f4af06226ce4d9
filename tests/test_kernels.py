# SPDX-License-Identifier: Apache-2.0
"""Every fused kernel against its reference, against float64 NumPy and against finite differences, on this device.

Where a kernel is not used (`available()` is False: a GPU has fast forms of its own) its array operations are right too.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_tools import Arrays, assert_near, assert_slopes, exact, normal, values_and_gradients

from mlx_realign.kernels import attention, exp, swiglu

# ---------------------------------------------------------------------------------------------- exp


def test_exp_is_right_between_its_limits():
    x = np.linspace(-44, 44, 100_001).astype(np.float32)
    right = np.exp(x.astype(np.float64))
    error = np.abs(exact(exp.fused(mx.array(x))) / right - 1)
    assert error.max() <= 3e-6
    assert error[np.abs(x) <= 1].max() <= 5e-7
    below = mx.array(x[x <= 0])
    assert mx.array_equal(exp.values(below, negative=True), exp.fused(below))


def test_exp_clips_and_lets_nan_through():
    found = exact(exp.fused(mx.array([-np.inf, -1e30, -45.0, 0.0, 45.0, np.nan])))
    np.testing.assert_allclose(found[:3], np.exp(-44.0), rtol=1e-5)
    assert found[3] == 1
    assert found[4] == pytest.approx(np.exp(44.0), rel=1e-5)
    assert np.isnan(found[5])
    assert np.isnan(exact(exp.values(mx.array([np.nan]), negative=True)))


def test_exp_is_its_own_derivative():
    """It is made of integers, through which MLX has no gradient and says 0."""
    x = mx.array(np.linspace(-20, 20, 101), mx.float32)
    for function in (exp.fused, exp.exp):
        slopes = mx.grad(lambda x, f=function: f(x).sum())(x)
        np.testing.assert_allclose(np.array(slopes), np.exp(np.array(x, np.float64)), rtol=2e-6)


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

on_cpu = pytest.mark.skipif(not swiglu.available(), reason="these kernels are for CPUs")
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


@pytest.mark.parametrize("kind", [kind for kind in masks(1) if kind.startswith("additive")])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["equal", "grouped", "one key head"])
def test_an_additive_mask_gets_its_gradient(kind: str, heads: tuple[int, int]):
    """Latent attention adds half of its scores as a mask; also where it is broadcast over rows, heads or queries."""
    arrays, mask = qkv(*heads), masks(heads[0])[kind]
    ways = [lambda *x, f=f: f(*x[:3], scale=0.4, mask=x[3]) for f in (attention.fused, attention.reference)]
    used = mx.array(USED)
    for shape in {mask.shape, (1, *mask.shape[1:]), mask.shape[1:], mask.shape[2:], (1, 1, 1, S)}:
        part = mask[tuple(slice(0, n) for n in (1,) * (4 - len(shape)) + shape)].reshape(shape)
        found, expected = (values_and_gradients(way, (*arrays, part), used)[4] for way in ways)
        assert found.shape == shape
        assert_near(found, expected, 5e-6)


def test_slopes_of_an_additive_mask_are_those_of_finite_differences():
    way = lambda q, k, v, mask: attention.fused(q, k, v, scale=0.4, mask=mask)  # noqa: E731
    assert_slopes(way, (*qkv(4, 2), normal(B, 4, L, S, seed=7)), 1e-4)


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
