# SPDX-License-Identifier: Apache-2.0
"""Experts that are a module each (DBRX), called once an expert: mlx-lm calls them token by token in evaluation mode.

Sorted: an expert is given the tokens routed to it, which takes a look at the numbers, one for a layer. A trace has
none: there every expert reads every token, more arithmetic and no wait. Both call the experts' own modules, so that
adapters, taps and quantised weights stay where they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

LOOKS = "Attempting to eval"  # in what MLX raises where a trace is asked for numbers
MOST = 4e9  # more arithmetic than this, of a layer on tokens that are not an expert's, takes longer than the wait

Experts = Sequence[Callable[[mx.array], mx.array]]


def routed(block: Any, x: mx.array) -> tuple[mx.array, mx.array]:
    """Weights in x's dtype and experts uint32, both [N, k], of tokens x [N, D]: mlx-lm's DBRX."""
    k = block.num_experts_per_tok
    gates = mx.softmax(block.router(x).astype(mx.float32), axis=-1)
    chosen = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[:, :k])
    scores = mx.take_along_axis(gates, chosen, axis=-1)
    return (scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)).astype(x.dtype), chosen


def by_expert(experts: Experts, x: mx.array, scores: mx.array, chosen: mx.array) -> mx.array:
    """The weighed sum [N, D] of each token's experts, each called with its tokens [n, D]; one without is not called.

    Raises what MLX does in a trace (LOOKS).
    """
    k = chosen.shape[-1]
    flat = chosen.flatten()
    order = mx.argsort(flat)
    counts: Any = (flat[:, None] == mx.arange(len(experts))).sum(0).tolist()
    x = x[order // k]
    made, at = [], 0
    for expert, n in zip(experts, counts, strict=True):
        made += [expert(x[at : at + n])] if n else []
        at += n
    y = mx.concatenate(made)[mx.argsort(order)]
    return (y.reshape(*chosen.shape, -1) * scores[..., None]).sum(1)


def dense(experts: Experts, x: mx.array, scores: mx.array, chosen: mx.array) -> mx.array:
    """The same, each expert called with all N tokens: zeros where one is not its own, which it might take too far."""
    total: Any = 0
    for e, expert in enumerate(experts):
        own = chosen == e
        weight = mx.where(own, scores, 0).sum(-1, keepdims=True)
        total = total + weight * expert(mx.where(own.any(-1, keepdims=True), x, 0))
    return total


def of(on: Callable[[], bool], stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The method `__call__` of mlx-lm's block of experts in one of both forms; `stock` itself when off."""

    def __call__(block: Any, x: mx.array) -> mx.array:
        if not on():
            return stock(block, x)
        tokens = x.reshape(-1, x.shape[-1])
        route = routed(block, tokens)
        try:
            y = by_expert(block.experts, tokens, *route)
        except ValueError as error:
            unused = len(block.experts) - block.num_experts_per_tok
            if LOOKS not in str(error) or 6 * len(tokens) * unused * block.d_model * block.ffn_dim > MOST:
                raise
            y = dense(block.experts, tokens, *route)
        return y.reshape(x.shape)

    return __call__
