# SPDX-License-Identifier: Apache-2.0
"""Log-probs of given tokens from hidden states, without ever holding a [tokens, vocabulary] array.

A frozen head runs over slices of the vocabulary with a running maximum and sum (the online softmax of FlashAttention,
arXiv:2205.14135). The same pass sums exp(logit) times the head's rows, so it ends with the gradient of each token's
log-prob with respect to its hidden state, W[token] - sum_v p_v W[v]. The backward pass is then one multiplication: no
logits are computed twice, exactly and for every loss, since a loss can only scale that gradient.

There are two forms of it. On a CPU slices stay in a cache, and float32 costs nothing. On a GPU each pass over a slice
goes through memory: `narrow` makes few, and writes nothing as large as the logits that is wider than they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .exp import exp_values

Logits = Callable[[mx.array], mx.array]  # hidden [n, D] -> logits [n, V]
SLICE_BYTES = 1 << 21  # of one slice of logits on a CPU: stays in the cache of a core
GPU_SLICE_BYTES = 1 << 26
PARTS = 8  # of a slice that one elementwise kernel adds up, so that only an eighth is written for the sum behind it
proven: set[mx.Dtype] = set()  # hidden states for which `narrow` was found right on this device, by scores_proof


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
        run = narrow if not on_cpu() and hidden.dtype in proven else _online
        return sliced(run, head.rows, head.vocabulary, hidden, tokens, gradient, squares)
    chunk = max(16, (SLICE_BYTES if on_cpu() else GPU_SLICE_BYTES) // head.vocabulary)  # four slices' worth of rows
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


def sliced(
    run: Callable[..., list[mx.array]],
    weight: Weight,
    vocabulary: int,
    hidden: mx.array,
    tokens: mx.array,
    gradient: bool,
    squares: bool,
) -> Rows:
    """Rows by a form of the pass (`narrow`, `_online`), with the slope that it gives as their gradient."""

    @mx.custom_function
    def scores(h: mx.array) -> list[mx.array]:
        return run(weight, vocabulary, h, tokens, gradient, squares)

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
    size = (SLICE_BYTES if on_cpu() else GPU_SLICE_BYTES) // (4 * tokens.shape[0])
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


def narrow(
    weight: Weight, vocabulary: int, h: mx.array, tokens: mx.array, gradient: bool, squares: bool, size: int = 0
) -> list[mx.array]:
    """As `_online`, for a GPU; size: columns of a slice, 0 as many as GPU_SLICE_BYTES hold.

    What a slice gives is normalised by the slice's own log-sum-exp, and `_joined` by that of all so far. In a token's
    own slice 1 is taken from its probability before that is rounded to 16 bits, since a sure token's slope is a small
    difference; W[token] then has the weight that is `elsewhere`, in the other slices.
    """
    size = size or max(2048, GPU_SLICE_BYTES // (h.dtype.size * tokens.shape[0]) // 1024 * 1024)
    sums: list[mx.array] = []
    top = own = hit = mx.array(0.0)
    columns = mx.arange(min(size, vocabulary))
    for start in range(0, vocabulary, size):
        stop = min(start + size, vocabulary)
        if sums:
            (h,) = mx.depends([h], [*sums, top, own, hit])
        logits = weight.logits(h, start, stop)
        place = (tokens - start)[:, None]
        near = mx.clip(place, 0, stop - start - 1)
        mine = mx.take_along_axis(logits, near, 1).astype(mx.float32)
        best = logits.argmax(-1, keepdims=True)
        high = mx.take_along_axis(logits, best, 1).astype(mx.float32)
        loss = mx.fast.cross_entropy(logits, near[:, 0])[:, None]
        lse = mine + loss
        entropy = _entropy(logits, lse)
        square = _square_sum(logits, lse) if squares else mx.ones_like(lse)
        off = _off_by(logits, mine, loss, columns[: stop - start], place) if gradient else None
        mean = mx.zeros((1, 1)) if off is None else weight.back(off, start, stop)
        here = [lse, entropy, square, (place != near).astype(mx.float32), mean]
        if not sums:
            top, own, hit, sums = high, mine, best == place, here
            continue
        own = mx.where(place == near, mine, own)
        hit = mx.where(high > top, best == place, hit)  # of equal logits the first counts, as argmax takes it
        top = mx.maximum(top, high)
        sums = list(_joined(*sums, *here))
    lse, entropy, square, elsewhere, mean = sums
    slope = elsewhere * weight.at(tokens).astype(mx.float32) - mean if gradient else mx.array(0.0)
    return [(own - lse)[:, 0], entropy[:, 0], hit.astype(mx.float32)[:, 0], mx.log(square)[:, 0], slope]


@mx.compile
def _off_by(logits: mx.array, mine: mx.array, loss: mx.array, columns: mx.array, place: mx.array) -> mx.array:
    """Probabilities, less 1 at the token's own column where that is among these."""
    return (mx.exp(logits.astype(mx.float32) - mine - loss) - (columns == place)).astype(logits.dtype)


@mx.compile
def _entropy(logits: mx.array, lse: mx.array) -> mx.array:
    return _added(lambda x: mx.exp(x - lse) * (lse - x), logits)


@mx.compile
def _square_sum(logits: mx.array, lse: mx.array) -> mx.array:
    return _added(lambda x: mx.exp(2 * (x - lse)), logits)


def _added(term: Callable[[mx.array], mx.array], logits: mx.array) -> mx.array:
    """Sum over a row [n, 1] of a term of each logit, float32. MLX fuses a chain of elementwise operations, no sum."""
    width = logits.shape[1] // PARTS
    cut = [logits[:, i * width : (i + 1) * width] for i in range(PARTS)]
    terms = [term(part.astype(mx.float32)) for part in cut]
    while len(terms) > 1:  # a tree: chains that are too deep are cut in two
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    total, rest = terms[0].sum(-1, keepdims=True), logits[:, PARTS * width :]
    return total + term(rest.astype(mx.float32)).sum(-1, keepdims=True) if rest.shape[1] else total


@mx.compile
def _joined(*given: mx.array) -> list[mx.array]:
    """(lse, entropy, sum p^2, elsewhere, weighted rows) of the columns so far, and the same of the next: of both."""
    lse, entropy, square, elsewhere, mean, next_lse, next_entropy, next_square, next_elsewhere, next_mean = given
    both = mx.logaddexp(lse, next_lse)
    log_a, log_b = lse - both, next_lse - both
    a, b = mx.exp(log_a), mx.exp(log_b)
    entropy = a * (entropy - log_a) + b * (next_entropy - log_b)
    elsewhere = a * elsewhere + b * next_elsewhere
    return [both, entropy, a * a * square + b * b * next_square, elsewhere, a * mean + b * next_mean]


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


def on_cpu() -> bool:
    """Whether arrays are computed on a CPU."""
    return mx.default_device().type == mx.DeviceType.cpu
