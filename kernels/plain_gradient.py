# SPDX-License-Identifier: Apache-2.0
"""Kernels of a GPU that mlx-lm calls while it trains and that have no gradient: theirs is that of the plain operations.

Also modules that must be in training mode to have one: in evaluation mode they take kernels, or keep what they made of
weights that training moves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

Arrays = Sequence[mx.array]

# Model file -> names of its modules. None of them has dropout, so that nothing else changes.
IN_TRAINING_MODE = {
    "kimi_k3": {"KimiK3DeltaAttention", "KimiK3DecoderLayer", "KimiK3TextModel"},  # a compiled step holds its weights
}


def set_modes(model: Any) -> list[Any]:
    """Put the modules named above into training mode, and no other ones; returns those that were in the other."""
    changed = []
    for module in model.modules():
        file = type(module).__module__.rpartition(".")[2]
        if type(module).__name__ in IN_TRAINING_MODE.get(file, ()) and not module.training:
            module._training = True
            changed.append(module)
    return changed


def with_gradient(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., list[mx.array]]:
    """`kernel` of arrays, its gradient, for each of them, that of `plain`, which computes the same."""

    @mx.custom_function
    def call(*arrays: mx.array) -> list[mx.array]:
        return list(kernel(*arrays))

    @call.vjp
    def backward(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        return mx.vjp(lambda *arrays: list(plain(*arrays)), list(primals), list(cotangents))[1]

    return call


def wkv7(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's `wkv7_kernel` (rwkv7.py), which a GPU always takes."""
    from mlx_lm.models import rwkv7

    def plain(
        r: mx.array, w: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        made, dtype = [], state.dtype
        for t in range(r.shape[1]):
            y, state = rwkv7._wkv7_step_ops(r[:, t], w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state)
            made.append(y)
        return mx.stack(made, 1).reshape(r.shape).astype(r.dtype), state.astype(dtype)

    return with_gradient(stock, plain)
