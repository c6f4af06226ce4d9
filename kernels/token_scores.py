# SPDX-License-Identifier: Apache-2.0
"""Log-probs of given tokens from hidden states, without ever holding a [tokens, vocabulary] array.

The head runs over chunks of rows. When it is frozen, the gradient of each token's log-prob with respect to its hidden
state, W[token] - sum_v p_v W[v], is formed in the same pass, so the backward pass is one multiplication and no logits
are computed twice: exact for every loss, since a loss can only scale it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .exp import exp

Logits = Callable[[mx.array], mx.array]  # hidden [n, D] -> logits [n, V]


class Head(NamedTuple):
    """How to get logits.

    weight [V, D]: given where logits are hidden @ weight.T and nothing else; allows the short gradient.
    module: given where the head itself is trained; its chunks are recomputed in the backward pass.
    """

    logits: Logits
    weight: mx.array | None = None
    module: nn.Module | None = None


class Rows(NamedTuple):
    """Per row of hidden states, float32 [N]; only logps carries a gradient."""

    logps: mx.array
    entropy: mx.array
    correct: mx.array


def reference(head: Head, hidden: mx.array, tokens: mx.array) -> Rows:
    """The same from the whole [N, V] array. hidden [N, D], tokens int32 [N]."""
    logits = head.logits(hidden).astype(mx.float32)
    every = logits - mx.logsumexp(logits, -1, keepdims=True)
    logps = mx.take_along_axis(every, tokens[:, None], 1)[:, 0]
    frozen = mx.stop_gradient(every)
    return Rows(logps, -(mx.exp(frozen) * frozen).sum(-1), (frozen.argmax(-1) == tokens).astype(mx.float32))


def fused(head: Head, hidden: mx.array, tokens: mx.array, *, chunk: int) -> Rows:
    """Chunks of `chunk` rows, one after another. hidden [N, D] of any float dtype, tokens int32 [N] -> float32 [N]."""
    if not tokens.size:
        return Rows(*(mx.zeros((0,)) for _ in range(3)))
    parts: list[Rows] = []
    for start in range(0, tokens.shape[0], chunk):
        h, t = hidden[start : start + chunk], tokens[start : start + chunk]
        if parts:  # wait for the last chunk, or the scheduler may hold the logits of all of them
            (h,) = mx.depends([h], [parts[-1].logps])
        parts.append(_frozen(head, h, t) if head.module is None else _recomputed(head, head.module, h, t))
    return Rows(*(mx.concatenate(column) for column in zip(*parts, strict=True)))


def available() -> bool:
    """Made of array operations only: it runs on every device."""
    return True


def _statistics(logits: mx.array, tokens: mx.array) -> tuple[Rows, mx.array]:
    """Rows and the probabilities [n, V] of float32 logits [n, V]."""
    top = logits.max(-1, keepdims=True)
    weights = exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    lse = top + mx.log(total)
    own = mx.take_along_axis(logits, tokens[:, None], 1)
    entropy = lse - (weights[:, None] @ logits[..., None])[:, 0] / total
    correct = (own >= top).astype(mx.float32)
    return Rows((own - lse)[:, 0], entropy[:, 0], correct[:, 0]), weights / total


def _frozen(head: Head, hidden: mx.array, tokens: mx.array) -> Rows:
    @mx.custom_function
    def scores(h: mx.array) -> list[mx.array]:
        if head.weight is not None:
            rows, p = _statistics(head.logits(h).astype(mx.float32), tokens)
            slope = head.weight[tokens] - p.astype(head.weight.dtype) @ head.weight
        else:  # quantised, soft-capped or adapted logits: the same slope by differentiating this chunk here
            _, slopes = mx.vjp(lambda x: _plain_logps(head, x, tokens), [h], [mx.ones(tokens.shape)])
            rows, slope = _statistics(head.logits(h).astype(mx.float32), tokens)[0], slopes[0]
        return [*rows, slope.astype(mx.float32)]

    @scores.vjp
    def backward(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        return (cotangents[0][:, None] * outputs[3]).astype(hidden.dtype)

    return Rows(*scores(hidden)[:3])


def _recomputed(head: Head, module: nn.Module, hidden: mx.array, tokens: mx.array) -> Rows:
    def run(
        parameters: dict[str, Any], h: mx.array
    ) -> list[mx.array]:  # parameters as arguments, or they get no gradient
        kept = module.trainable_parameters()
        module.update(parameters)
        rows = reference(head, h, tokens)
        module.update(kept)
        return list(rows)

    return Rows(*mx.checkpoint(run)(module.trainable_parameters(), hidden))


def _plain_logps(head: Head, hidden: mx.array, tokens: mx.array) -> mx.array:
    logits = head.logits(hidden).astype(mx.float32)
    return mx.take_along_axis(logits, tokens[:, None], 1)[:, 0] - mx.logsumexp(logits, -1)
