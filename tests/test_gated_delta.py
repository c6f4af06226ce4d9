# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in chunks equals mlx-lm's steps: values, gradients and states, whatever the gates."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gated_delta as stock

from mlx_realign.kernels import gated_delta, plain_gradient

OURS = gated_delta.of(lambda: True, stock.gated_delta_update)
# tokens, heads of keys and values, widths of both, a gate for each channel, lower bound, beta up to 2, strength
CASES = {
    "one chunk": (37, (2, 4), (16, 8), False, None, False, 1.0),
    "chunks": (130, (2, 2), (32, 16), False, None, True, 1.0),
    "one token": (1, (2, 2), (16, 16), False, None, False, 1.0),
    "channels": (50, (2, 4), (16, 16), True, None, False, 1.0),
    "bounded": (35, (2, 2), (16, 16), True, -5.0, False, 1.0),
    "strong": (100, (2, 2), (16, 16), False, None, True, 30.0),
    "strong channels": (50, (2, 2), (16, 16), True, None, True, 30.0),
    "MLX's own": (70, (16, 16), (128, 128), False, None, False, 1.0),
}


def inputs(case: str) -> tuple[list[mx.array], dict[str, Any], mx.array]:
    """q, k, v, a, b, A_log, dt_bias, state; options; a mask with padding on the left of the second row."""
    length, (few, many), (keys, values), channels, bound, negative, strength = CASES[case]
    rng = np.random.default_rng(7)
    draw = lambda *shape: mx.array(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    q, k = stock.normalize_qk(draw(2, length, few, keys), draw(2, length, few, keys), inv_scale=keys**-0.5, eps=1e-6)
    a = strength * draw(2, length, many, *([keys] if channels else []))
    gate = [draw(many, *([1] if channels else [])), draw(many, *([keys] if channels else []))]
    arrays = [q, k, draw(2, length, many, values), a, draw(2, length, many), *gate, draw(2, many, values, keys)]
    mask = mx.arange(length)[None] >= mx.array([[0], [min(5, length - 1)]])
    return arrays, {"lower_bound": bound, "allow_neg_eigval": negative, "use_kernel": False}, mask


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_steps(case: str, masked: bool):
    arrays, options, mask = inputs(case)
    real = mask[..., None, None] if masked else mx.array(1.0)
    wanted = [mx.random.normal(x.shape, key=mx.random.key(i)) for i, x in enumerate((arrays[2], arrays[7]))]

    def outputs(update: Any, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        y, state = update(*arrays, mask if masked else None, **options)
        return y * real, state

    def loss(update: Any, *arrays: mx.array) -> mx.array:
        return sum((y * w).sum() for y, w in zip(outputs(update, *arrays), wanted, strict=True))  # type: ignore[return-value]

    slopes = mx.grad(loss, argnums=tuple(range(1, 9)))
    found, expected = (
        [*outputs(f, *arrays), *slopes(f, *arrays)]
        for f in (lambda *x, **y: gated_or(OURS, *x, **y), stock.gated_delta_update)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert bool(mx.isfinite(ours).all())
        assert float(mx.abs(ours - theirs).max()) <= 1e-5 * max(1e-3, float(mx.abs(theirs).max()))


def gated_or(update: Any, *arrays: Any, **options: Any) -> Any:
    """A single token with a state is decoding, which is mlx-lm's: without one it is ours."""
    q, k, v, a, b, A_log, dt_bias, state, mask = arrays
    if q.shape[1] > 1:
        return update(*arrays, **options)
    beta, log_g = mx.sigmoid(b), gated_delta.log_gate(a, A_log, dt_bias)
    if mask is not None:
        beta, log_g = mx.where(mask[..., None], beta, 0), mx.where(mask[..., None], log_g, 0)
    return gated_delta.chunked(q, k, v, log_g, beta, state)


def test_steps_serve_where_chunks_are_wrong_on_a_machine_and_never_a_kernel():
    asked: list[bool] = []

    def own(*arrays: Any, use_kernel: bool, **options: Any) -> Any:
        asked.append(use_kernel)
        return stock.gated_delta_update(*arrays, use_kernel=use_kernel, **options)

    arrays, options, _ = inputs("one chunk")
    stepped: Any = gated_delta.of(lambda: True, own, chunks=False)
    found = stepped(*arrays, None, **(options | {"use_kernel": True}))
    steps: Any = stock.gated_delta_update
    expected = steps(*arrays, None, **options)
    assert all(mx.array_equal(x, y) for x, y in zip(found, expected, strict=True)) and asked == [False]


def test_mlx_own_function_means_the_same():
    """`mx.fast.gated_delta_update` is what a GPU takes for the shapes of `FAST`."""
    arrays, _, _ = inputs("MLX's own")
    q, k, v, a, b, A_log, dt_bias, state = arrays
    log_g, beta = gated_delta.log_gate(a, A_log, dt_bias), mx.sigmoid(b)
    assert gated_delta.fits(q, v, log_g, None) and not gated_delta.fits(q, v, log_g, mx.ones((2, 70), mx.bool_))
    expected = gated_delta.chunked(q, k, v, log_g, beta, state)
    for ours, theirs in zip(mx.fast.gated_delta_update(q, k, v, mx.exp(log_g), beta, state), expected, strict=True):
        assert float(mx.abs(ours - theirs).max()) <= 1e-4 * float(mx.abs(theirs).max())


def test_a_gradient_takes_less_memory_than_steps():
    arrays, options, _ = inputs("chunks")
    arrays = [mx.concatenate([x] * 4, 1) if x.ndim > 2 and x.shape[1] == 130 else x for x in arrays]
    peaks = []
    for update in (OURS, stock.gated_delta_update):
        slope = mx.grad(lambda *x, update=update: update(*x, None, **options)[0].square().sum(), argnums=(0, 1, 2))
        mx.eval(slope(*arrays))
        mx.reset_peak_memory()
        mx.eval(slope(*arrays))
        peaks.append(mx.get_peak_memory())
    assert peaks[0] < 0.7 * peaks[1]


def test_the_gradient_of_a_kernel_is_that_of_the_plain_operations_for_every_array():
    plain = lambda x, y, z: [mx.sin(x) * y, x + z.sum()]  # noqa: E731
    wrapped = plain_gradient.with_gradient(lambda x, y, z: [mx.stop_gradient(a) for a in plain(x, y, z)], plain)
    arrays = [mx.random.normal((3,), key=mx.random.key(i)) for i in range(3)]
    total = lambda f: lambda *a: sum(((i + 1) * y).sum() for i, y in enumerate(f(*a)))  # noqa: E731
    for ours, theirs in zip(*(mx.grad(total(f), argnums=(0, 1, 2))(*arrays) for f in (wrapped, plain)), strict=True):
        assert mx.allclose(ours, theirs)
