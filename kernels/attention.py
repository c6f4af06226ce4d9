# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention for CPUs: fast exp, query heads that share keys in one matmul, short backward pass."""

from typing import Any

import mlx.core as mx

from .exp import available
from .exp import values as fast_exp

__all__ = ["available", "fused", "reference"]

Mask = mx.array | str | None
MASKED = -1e30  # added to scores; finite, so that a row without keys stays finite


def reference(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask = None, sinks: Any = None) -> mx.array:
    """softmax(scale q k^T + mask) v. q [B, H, L, D], k and v [B, Hkv, S, D], mask bool (True = look) or additive."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def fused(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask = None, sinks: Any = None) -> mx.array:
    """The same to 1e-6 in float32. Decoding steps, other dtypes and attention sinks take the reference."""
    if sinks is not None or q.shape[2] == 1 or {q.dtype, k.dtype, v.dtype} != {mx.float32}:
        return reference(q, k, v, scale=scale, mask=mask, sinks=sinks)
    b, h, length, d = q.shape
    shared, keys = k.shape[1], k.shape[2]
    # Rows of one key head: its query heads one after another.
    out = _attend(q.reshape(b, shared, -1, d), k, v, _bias(mask, length, keys, h // shared), scale)
    return out.reshape(b, h, length, v.shape[3])


def _bias(mask: Mask, length: int, keys: int, repeats: int) -> mx.array | None:
    """float32 addend for scores [B, Hkv, repeats * L, S], or None."""
    if mask is None:
        return None
    if isinstance(mask, str):  # "causal": the last query sees every key
        mask = mx.arange(keys - length, keys)[:, None] >= mx.arange(keys)
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, MASKED)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).astype(mx.float32)
    if mask.shape[1] != 1:  # one mask per query head: lay it out as the rows are
        return mx.broadcast_to(mask, (*mask.shape[:2], length, keys)).reshape(mask.shape[0], -1, repeats * length, keys)
    return mx.tile(mx.broadcast_to(mask, (*mask.shape[:2], length, keys)), (1, 1, repeats, 1))


def _attend(q: mx.array, k: mx.array, v: mx.array, bias: mx.array | None, scale: float) -> mx.array:
    @mx.custom_function
    def run(q: mx.array, k: mx.array, v: mx.array, *bias: mx.array) -> list[mx.array]:
        scores = (q * scale) @ k.swapaxes(-1, -2)
        for b in bias:
            scores = scores + b
        weights = fast_exp(scores - scores.max(-1, keepdims=True), negative=True)
        p = weights / weights.sum(-1, keepdims=True)
        return [p @ v, p]

    @run.vjp
    def gradient(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
        (q, k, v, *bias), dy, (y, p) = primals, cotangents[0], outputs
        ds = p * (dy @ v.swapaxes(-1, -2) - (dy * y).sum(-1, keepdims=True))
        dbias = [_summed_to(b.shape, ds) for b in bias]  # lazy: computed only where the mask has a gradient
        return (ds @ k) * scale, (ds.swapaxes(-1, -2) @ q) * scale, p.swapaxes(-1, -2) @ dy, *dbias

    return run(q, k, v, *([] if bias is None else [bias]))[0]


def _summed_to(shape: tuple[int, ...], x: mx.array) -> mx.array:
    """x summed over the axes along which an array of this shape was repeated to x's."""
    repeated = [i for i, n in enumerate(shape) if n != x.shape[i]]
    return x.sum(repeated, keepdims=True) if repeated else x
