# SPDX-License-Identifier: Apache-2.0
"""silu(gate) * x for CPUs: a fast exp, and a backward pass that reuses the sigmoid instead of computing it again."""

import mlx.core as mx
import mlx.nn as nn

from .exp import available
from .exp import values as fast_exp

__all__ = ["available", "fused", "reference"]


def reference(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x; same shapes, any float dtype."""
    return nn.silu(gate) * x


@mx.custom_function
def _float32(gate: mx.array, x: mx.array) -> list[mx.array]:
    s = 1.0 / (fast_exp(-gate) + 1.0)
    return [gate * s * x, s]


@_float32.vjp
def _gradient(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array]:
    (gate, x), dy, s = primals, cotangents[0], outputs[1]
    silu = gate * s
    return dy * x * (s + silu - silu * s), dy * silu


def fused(gate: mx.array, x: mx.array) -> mx.array:
    """The same, relative error < 1e-6 in float32; other dtypes take the reference."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        return reference(gate, x)
    return _float32(gate, x)[0]
