# SPDX-License-Identifier: Apache-2.0
"""Log-probs of given tokens from hidden states, without ever holding a [tokens, vocabulary] array.

A frozen head runs over slices of the vocabulary with a running maximum and sum (the online softmax of FlashAttention,
arXiv:2205.14135). The same pass sums exp(logit) times the head's rows, so it ends with the gradient of each token's
log-prob with respect to its hidden state, W[token] - sum_v p_v W[v]. The backward pass is then one multiplication: no
logits are computed twice, exactly and for every loss, since a loss can only scale that gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .exp import exp_values

Logits = Callable[[mx.array], mx.array]  # hidden [n, D] -> logits [n, V]
SLICE_BYTES = 1 << 21  # of one slice of logits on a CPU: stays in the cache of a core
GPU_SLICE_BYTES = 1 << 26


class Head(NamedTuple):
    """How to get logits.

    rows: given where logits are hidden @ weight.T and nothing else; (start, stop) -> those rows of the weight.
    module: given where the head itself is trained; its chunks are recomputed in the backward pass.
    """

    logits: Logits
    vocabulary: int
    rows: "Weight | None" = None
    module: nn.Module | None = None


class Weight(NamedTuple):
    """A frozen head's weight [V, D], dense or quantised."""

    tensors: dict[str, mx.array]  # weight, and scales, biases where quantised
    options: dict[str, Any]  # of quantized_matmul; empty where dense

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        """hidden [n, D] -> [n, stop - start]."""
        return self._product(hidden, start, stop, True)

    def back(self, p: mx.array, start: int, stop: int) -> mx.array:
        """p [n, stop - start] -> [n, D]."""
        return self._product(p, start, stop, False)

    def at(self, tokens: mx.array) -> mx.array:
        """Rows [n, D] of tokens [n]."""
        found = {name: value[tokens] for name, value in self.tensors.items()}
        return mx.dequantize(*_order(found), **self.options) if self.options else found["weight"]

    def _product(self, x: mx.array, start: int, stop: int, transpose: bool) -> mx.array:
        part = {name: value[start:stop] for name, value in self.tensors.items()}
        if self.options:
            return mx.quantized_matmul(x, *_order(part), transpose=transpose, **self.options)
        return x @ (part["weight"].T if transpose else part["weight"])


class Rows(NamedTuple):
    """Per row of hidden states, float32 [N]; only logps carries a gradient."""

    logps: mx.array
    entropy: mx.array
    correct: mx.array
    log_sum_sq: mx.array  # log sum_v p_v^2, where asked for


def reference(head: Head, hidden: mx.array, tokens: mx.array) -> Rows:
    """The same from the whole [N, V] array. hidden [N, D], tokens int32 [N]."""
    logits = head.logits(hidden).astype(mx.float32)
    every = logits - mx.logsumexp(logits, -1, keepdims=True)
    logps = mx.take_along_axis(every, tokens[:, None], 1)[:, 0]
    frozen = mx.stop_gradient(every)
    entropy, correct = -(mx.exp(frozen) * frozen).sum(-1), (frozen.argmax(-1) == tokens).astype(mx.float32)
    return Rows(logps, entropy, correct, mx.logsumexp(2 * frozen, -1))


def fused(head: Head, hidden: mx.array, tokens: mx.array, *, gradient: bool = True, squares: bool = False) -> Rows:
    """Slice by slice. hidden [N, D] of any float dtype, tokens int32 [N] -> float32 [N].

    gradient: False where nobody will ask for one (reference, evaluation), which halves the work.
    squares: True where log_sum_sq is wanted; else it may be anything.
    """
    if not tokens.size:
        return Rows(*(mx.zeros((0,)) for _ in Rows._fields))
    if head.rows is not None and head.module is None:
        return _sliced(head.rows, head.vocabulary, hidden, tokens, gradient, squares)
    chunk = max(16, (SLICE_BYTES if _on_cpu() else GPU_SLICE_BYTES) // head.vocabulary)  # four slices' worth of rows
    parts: list[Rows] = []
    for start in range(0, tokens.shape[0], chunk):
        h, t = hidden[start : start + chunk], tokens[start : start + chunk]
        if parts:  # wait for the last chunk, or the scheduler may hold the logits of all of them
            (h,) = mx.depends([h], [parts[-1].logps])
        parts.append(_recomputed(head, head.module, h, t))
    return Rows(*(mx.concatenate(column) for column in zip(*parts, strict=True)))


def available() -> bool:
    """Made of array operations only: it runs on every device."""
    return True


def _sliced(weight: Weight, vocabulary: int, hidden: mx.array, tokens: mx.array, gradient: bool, squares: bool) -> Rows:
    @mx.custom_function
    def scores(h: mx.array) -> list[mx.array]:
        return _online(weight, vocabulary, h, tokens, gradient, squares)

    @scores.vjp
    def backward(primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        if not gradient:
            raise RuntimeError("log-probs that were taken with gradient=False have none")
        return (cotangents[0][:, None] * outputs[4]).astype(hidden.dtype)

    return Rows(*scores(hidden)[:4])


def _online(
    weight: Weight, vocabulary: int, h: mx.array, tokens: mx.array, gradient: bool, squares: bool
) -> list[mx.array]:
    """logps, entropy, correct, log_sum_sq, and the slope [N, D] (a zero where no gradient is asked for)."""
    size = (SLICE_BYTES if _on_cpu() else GPU_SLICE_BYTES) // (4 * tokens.shape[0])
    size = max(2048, size // 1024 * 1024)
    top = total = weighted = square = slope = hit = None
    own = mx.zeros((tokens.shape[0], 1))
    for start in range(0, vocabulary, size):
        stop = min(start + size, vocabulary)
        if top is not None:  # one slice after the other, and nothing left over that would keep a slice's logits alive
            (h,) = mx.depends([h], [total, weighted, square, slope, own, hit])
        logits = weight.logits(h, start, stop).astype(mx.float32)
        place = tokens[:, None] - start
        mine = mx.take_along_axis(logits, mx.clip(place, 0, stop - start - 1), 1)
        own = mx.where((place >= 0) & (place < stop - start), mine, own)
        best = logits.argmax(-1, keepdims=True)
        high = mx.take_along_axis(logits, best, 1)
        if top is None:
            shrink, top_now, hit = None, high, best == place
        else:
            top_now = mx.maximum(top, high)
            hit = mx.where(high > top, best == place, hit)  # of equal logits the first counts, as argmax takes it
            shrink = mx.exp(top - top_now)
        e = exp_values(logits - top_now)
        dot = lambda a, b: (a[:, None] @ b[..., None])[:, 0]  # noqa: E731
        sums = [e.sum(-1, keepdims=True), dot(e, logits)]
        again = dot(e, e) if squares else mx.ones_like(top_now)
        back = weight.back(e.astype(h.dtype), start, stop).astype(mx.float32) if gradient else mx.array(0.0)
        if shrink is None:
            total, weighted, square, slope = *sums, again, back
        else:
            square = square * shrink.square() + again if squares else again
            before = (total, weighted, slope)
            total, weighted, slope = (a * shrink + b for a, b in zip(before, (*sums, back), strict=True))
        top = top_now
    assert top is not None and total is not None and square is not None and hit is not None
    lse = top + mx.log(total)
    log_sum_sq = (mx.log(square) - 2 * mx.log(total))[:, 0]
    slope = weight.at(tokens).astype(mx.float32) - slope / total if gradient else mx.array(0.0)
    return [(own - lse)[:, 0], (lse - weighted / total)[:, 0], hit.astype(mx.float32)[:, 0], log_sum_sq, slope]


def _recomputed(head: Head, module: nn.Module | None, hidden: mx.array, tokens: mx.array) -> Rows:
    def run(parameters: dict[str, Any], h: mx.array) -> list[mx.array]:  # arguments, or they get no gradient
        if module is None:
            return list(reference(head, h, tokens))
        kept = module.trainable_parameters()
        module.update(parameters)
        rows = reference(head, h, tokens)
        module.update(kept)
        return list(rows)

    return Rows(*mx.checkpoint(run)(module.trainable_parameters() if module else {}, hidden))


def _order(tensors: dict[str, mx.array]) -> list[mx.array | None]:
    return [tensors["weight"], tensors["scales"], tensors.get("biases")]


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu
