# SPDX-License-Identifier: Apache-2.0
"""Attention of one decoding step where several rows share a prompt: the prompt's keys and values are read once for all.

Scores against the prompt are one matmul per prompt, those against a row's own tokens one per row; the two softmaxes
are merged by their maxima and sums, as FlashAttention merges blocks (arXiv:2205.14135). Forward only.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from .exp import exp_values

__all__ = ["Groups", "available", "fused", "reference"]

MASKED = -1e30  # finite, so that a row that sees no key of a part stays finite


class Groups(NamedTuple):
    """Which rows share a prompt. regular: rows lie prompt by prompt, as many of each, so that nothing is gathered."""

    row_prompt: mx.array  # int32 [B]
    members: mx.array  # int32 [P, G] rows of each prompt, any row where a prompt has fewer
    place: mx.array  # int32 [B] where a row stands in members, flat
    regular: bool


def reference(
    q: mx.array,
    prompt: tuple[mx.array, mx.array],
    own: tuple[mx.array, mx.array],
    groups: Groups,
    *,
    scale: float,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """[B, H, 1, D]. q [B, H, 1, D]; keys and values of prompts [P, Hkv, Lp, D] and of rows [B, Hkv, T, D].

    mask: bool [B, 1, 1, Lp + T], True = look. sinks: [H] logits that take part in the softmax and have no value.
    """
    keys, values = (mx.concatenate([a[groups.row_prompt], b], 2) for a, b in zip(prompt, own, strict=True))
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)


def fused(
    q: mx.array,
    prompt: tuple[mx.array, mx.array],
    own: tuple[mx.array, mx.array],
    groups: Groups,
    *,
    scale: float,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """The same to 1e-6 in float32, without a copy of the prompt's keys and values per row."""
    rows, heads, _, size = q.shape
    shared, columns = prompt[0].shape[1], prompt[0].shape[2]
    prompts, most = groups.members.shape
    x = (q * scale).reshape(rows, shared, -1, size)
    repeats = x.shape[2]

    def by_prompt(rows_first: mx.array) -> mx.array:  # [B, Hkv or 1, repeats or 1, n] -> [P, same, G * repeats, n]
        a = rows_first if groups.regular else rows_first[groups.members.reshape(-1)]
        _, h, r, n = a.shape
        return a.reshape(prompts, most, h, r, n).transpose(0, 2, 1, 3, 4).reshape(prompts, h, most * r, n)

    def by_row(prompts_first: mx.array) -> mx.array:
        a = prompts_first.reshape(prompts, shared, most, repeats, -1).transpose(0, 2, 1, 3, 4)
        a = a.reshape(prompts * most, shared, repeats, -1)
        return a if groups.regular else a[groups.place]

    ahead = behind = None
    if mask is not None:
        ahead = by_prompt(mx.broadcast_to(mask[..., :columns], (rows, 1, repeats, columns)))
        behind = mask[..., columns:]
    of_prompt = [by_row(part) for part in _part(by_prompt(x), *prompt, ahead)]
    of_own = _part(x, *own, behind)
    return _merge(of_prompt, of_own, sinks, (shared, repeats)).astype(q.dtype).reshape(rows, heads, 1, -1)


def available() -> bool:
    """Made of array operations only: it runs on every device."""
    return True


def _part(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> list[mx.array]:
    """Unnormalised values [.., n, D], maxima and sums [.., n, 1], float32, of a softmax over some of the keys."""
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32)
    if mask is not None:
        scores = mx.where(mask, scores, MASKED)
    top = scores.max(-1, keepdims=True)
    weights = exp_values(scores - top)
    return [(weights.astype(v.dtype) @ v).astype(mx.float32), top, weights.sum(-1, keepdims=True)]


def _merge(a: list[mx.array], b: list[mx.array], sinks: mx.array | None, heads: tuple[int, int]) -> Any:
    top = mx.maximum(a[1], b[1])
    if sinks is not None:
        sinks = sinks.astype(mx.float32).reshape(1, *heads, 1)
        top = mx.maximum(top, sinks)
    left, right = exp_values(a[1] - top), exp_values(b[1] - top)
    total = a[2] * left + b[2] * right
    if sinks is not None:
        total = total + exp_values(sinks - top)
    return (a[0] * left + b[0] * right) / total
