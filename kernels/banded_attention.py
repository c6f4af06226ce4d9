# SPDX-License-Identifier: Apache-2.0
"""Attention that looks back a window shorter than the row, in memory of row times window instead of row squared.

Queries are cut into blocks as long as the window; each block sees its own keys and those of the block before it. MLX
has no backward pass for a window that keeps no array of queries by keys, so the array is at least made narrow.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

__all__ = ["Band", "available", "fused", "reference"]

WORTH = 3  # blocks that the keys must fill; below, the cut costs more than it saves
STEP = 4  # tokens; blocks are multiples of it


class Band(str):
    """ "causal" for whoever takes no notice of it, but `window` tokens back only. What attends must ask for it."""

    window: int

    def __new__(cls, window: int) -> "Band":
        made = super().__new__(cls, "causal")
        made.window = window
        return made

    def array(self, queries: int, keys: int) -> mx.array:
        """bool [queries, keys], True = look; the last query sees the last key."""
        query, key = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)[None]
        return (query >= key) & (query - key < self.window)


Attend = Callable[..., mx.array]


def reference(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Band, sinks: Any = None) -> mx.array:
    """softmax(scale q k^T) v within the band. q [B, H, L, D], k and v [B, Hkv, S, D]."""
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=scale, mask=mask.array(q.shape[2], k.shape[2]), sinks=sinks
    )


def fused(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Band, sinks: Any = None, attend: Attend | None = None
) -> mx.array:
    """The same. attend: what computes the attention of blocks; called as `reference` is, with an array as mask."""
    attend = attend or mx.fast.scaled_dot_product_attention
    block = -(-mask.window // STEP) * STEP
    batch, heads, length, _ = q.shape
    start = k.shape[2] - length
    blocks = -(-length // block)
    if k.shape[2] < WORTH * block:
        return attend(q, k, v, scale=scale, mask=mask.array(length, k.shape[2]), sinks=sinks)
    wider = blocks * block - length

    def of_queries(x: mx.array) -> mx.array:  # [B, H, L, D] -> [B * blocks, H, block, D]
        x = mx.pad(x, [(0, 0), (0, 0), (0, wider), (0, 0)]).reshape(batch, x.shape[1], blocks, block, -1)
        return x.swapaxes(1, 2).reshape(batch * blocks, x.shape[1], block, -1)

    def of_keys(x: mx.array) -> mx.array:  # [B, Hkv, S, D] -> [B * blocks, Hkv, 2 block, D]
        x = mx.pad(x[:, :, max(start - block, 0) :], [(0, 0), (0, 0), (max(block - start, 0), wider), (0, 0)])
        x = x.reshape(batch, x.shape[1], blocks + 1, block, -1)
        x = mx.concatenate([x[:, :, :-1], x[:, :, 1:]], 3)
        return x.swapaxes(1, 2).reshape(batch * blocks, x.shape[2 - 1], 2 * block, -1)

    key = start - block + mx.arange(blocks)[:, None] * block + mx.arange(2 * block)[None]  # its place in the text
    seen = mask.array(block, 2 * block)[None] & (key >= 0)[:, None]
    seen = mx.tile(seen[:, None], (batch, 1, 1, 1))
    out = attend(of_queries(q), of_keys(k), of_keys(v), scale=scale, mask=seen, sinks=sinks)
    out = out.reshape(batch, blocks, heads, block, -1).swapaxes(1, 2).reshape(batch, heads, blocks * block, -1)
    return out[:, :, :length]


def available() -> bool:
    """Made of array operations only: it runs on every device."""
    return True
