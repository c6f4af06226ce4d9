# SPDX-License-Identifier: Apache-2.0
"""Comparing a kernel with its reference, with float64, with finite differences."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

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
