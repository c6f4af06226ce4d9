# SPDX-License-Identifier: Apache-2.0
"""exp for CPUs: MLX computes it one element at a time there (20 ns each); a polynomial of whole-array passes takes 5.

x = (n + f) ln 2 with integer n and |f| <= 1/2; 2^f is a polynomial and 2^n an addition to the exponent bits. Adding and
taking away 1.5 * 2^23 rounds to the nearest integer and leaves n in the low bits of the sum.
"""

from typing import Any

import mlx.core as mx

LOG2_E = 1.4426950408889634
ROUND = 12582912.0
LIMIT = 44.0  # exp(-44) = 8e-20: nothing beside 1, and far from the denormals that slow a matmul down tenfold
# Minimax fit of relative error to 2^f on [-1/2, 1/2], highest power first: largest error 5.6e-8, below one ulp.
COEFFICIENTS = (0.001324088773, 0.009674739177, 0.05550837614, 0.2402215427, 0.693146892, 1.000000056)


def available() -> bool:
    """Only where the default device is a CPU; GPUs have a fast exp of their own."""
    return mx.default_device().type == mx.DeviceType.cpu


def reference(x: mx.array) -> mx.array:
    """exp(x) in x's dtype."""
    return mx.exp(x)


def values(x: mx.array, *, negative: bool = False) -> mx.array:
    """exp(x) for float32 x, x clipped to [-44, 44], without a derivative: for the inside of a custom function.

    Relative error up to 3e-6 at the ends, where rounding x * log2(e) dominates, as in mx.exp; 1e-7 near 0.

    negative: the caller knows that x <= 0, which saves a pass.
    """
    z = (mx.maximum(x, -LIMIT) if negative else mx.clip(x, -LIMIT, LIMIT)) * LOG2_E
    shifted = z + ROUND
    f = z - (shifted - ROUND)
    p = f * COEFFICIENTS[0] + COEFFICIENTS[1]
    for c in COEFFICIENTS[2:]:
        p = p * f + c
    return mx.view(mx.view(p, mx.int32) + (mx.view(shifted, mx.int32) << 23), mx.float32)


def fused(x: mx.array) -> mx.array:
    """As `values`; its derivative is what it gives."""
    return _differentiable(x)


@mx.custom_function
def _differentiable(x: mx.array) -> Any:
    return values(x)


@_differentiable.vjp
def _gradient(x: mx.array, dy: mx.array, y: mx.array) -> mx.array:  # through integers MLX would silently say 0
    return dy * y


def exp(x: mx.array) -> mx.array:
    """exp(x) by the faster way here (on a CPU clipped to [-44, 44])."""
    return fused(x) if available() and x.dtype == mx.float32 else reference(x)


def exp_values(x: mx.array) -> mx.array:
    """The same for x <= 0, without a derivative: inside custom functions, or where nobody can ask for one."""
    return values(x, negative=True) if available() and x.dtype == mx.float32 else reference(x)
