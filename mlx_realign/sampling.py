# SPDX-License-Identifier: Apache-2.0
"""Next tokens from logits, a whole batch at a time, by one uniform number per row: the inverse of the distribution.

One number a token instead of one per vocabulary entry (Gumbel noise) costs a tenth of the time, and a row's numbers
belong to the row: the text of a seed does not depend on which other rows it is generated with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .errors import UserError
from .kernels.exp import exp_values

BLOCK = 256  # entries whose sum is looked at first


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability; 1 is off
    top_k: int = 0  # sample from the k likeliest tokens; 0 is off
    min_p: float = 0.0  # leave out tokens below this share of the likeliest one's probability; 0 is off
    repetition_penalty: float = 1.0  # logits of tokens seen are divided (negative ones: multiplied) by it; 1 is off
    stop: tuple[str, ...] = ()  # a completion ends before the first of these strings

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

    @property
    def scale(self) -> float:
        """What logits are divided by when a log-prob is taken: the temperature, 1 where the likeliest token is."""
        return self.temperature or 1.0


def numbers(seed: Sequence[int], count: int) -> np.ndarray:
    """float32 [count] in [0, 1): the numbers of a row, a function of the seed alone."""
    return np.random.default_rng(list(seed)).random(count, np.float32)


def pick(
    logits: mx.array, uniform: mx.array, sampling: Sampling, seen: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Tokens int32 [B] and their log-probs float32 [B], nats, from logits [B, V] and numbers [B] in [0, 1).

    The log-probs are those of softmax(logits / temperature) over the whole vocabulary, which is what a trainer
    computes: penalties and truncation decide what is drawn, not what its probability is said to be.
    seen: bool [B, V] of tokens a row has had, for the repetition penalty (Keskar et al. 2019, arXiv:1909.05858).
    """
    raw = logits.astype(mx.float32) / sampling.scale
    wanted = raw
    if seen is not None and sampling.repetition_penalty != 1:
        penalised = mx.where(raw > 0, raw / sampling.repetition_penalty, raw * sampling.repetition_penalty)
        wanted = mx.where(seen, penalised, raw)
    if sampling.temperature == 0:
        tokens = mx.argmax(wanted, -1, keepdims=True)
        logps = mx.take_along_axis(raw, tokens, -1) - mx.logsumexp(raw, -1, keepdims=True)
        return tokens[:, 0].astype(mx.int32), logps[:, 0]
    top = wanted.max(-1, keepdims=True)
    weights = exp_values(wanted - top)
    tokens, total = drawn(truncated(weights, sampling), uniform)
    whole = wanted is raw and not (sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    lse = top + mx.log(total) if whole else mx.logsumexp(raw, -1, keepdims=True)
    return tokens[:, 0].astype(mx.int32), (mx.take_along_axis(raw, tokens, -1) - lse)[:, 0]


def drawn(weights: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """([B, 1] entries drawn in proportion to weights [B, V], by numbers [B] in [0, 1); [B, 1] sums of all weights).

    The entry where the running sum passes the drawn share of the whole: first the block, then the place in it, so that
    only one pass goes over all entries. It has a weight above 0, or the sum would not pass there.
    """
    rows, count = weights.shape
    blocks = mx.pad(weights, [(0, 0), (0, -count % BLOCK)]).reshape(rows, -1, BLOCK)
    running = mx.cumsum(blocks.sum(-1), -1)
    total = running[:, -1:]
    goal = mx.maximum(uniform[:, None], 2**-25) * total  # at 0 the first entry would be drawn, however small
    block = mx.argmax(running > goal, -1, keepdims=True).astype(mx.int32)
    before = mx.where(block > 0, mx.take_along_axis(running, mx.maximum(block - 1, 0), -1), 0.0)
    chosen = mx.broadcast_to(block[..., None], (rows, 1, BLOCK))
    inside = mx.cumsum(mx.take_along_axis(blocks, chosen, 1)[:, 0], -1)
    # The block's own sum may be a rounding short of what the blocks' sums say: then its last entry with a weight.
    goal = mx.minimum(goal - before, inside[:, -1:] * (1 - 2**-23))
    return block * BLOCK + mx.argmax(inside > goal, -1, keepdims=True), total


def truncated(weights: mx.array, sampling: Sampling) -> mx.array:
    """Unnormalised probabilities [B, V] with those that top-k, top-p and min-p leave out set to 0.

    In this order, each on what the one before has left, as Hugging Face's warpers do. Entries of equal weight at the
    border of top-k or top-p all stay.
    """
    if 0 < sampling.top_k < weights.shape[-1]:
        border = mx.topk(weights, sampling.top_k, -1).min(-1, keepdims=True)
        weights = mx.where(weights >= border, weights, 0.0)
    if sampling.top_p < 1:
        falling = mx.sort(weights, -1)[:, ::-1]
        share = mx.cumsum(falling, -1)
        kept = (share - falling < sampling.top_p * share[:, -1:]).sum(-1, keepdims=True)
        border = mx.take_along_axis(falling, mx.maximum(kept - 1, 0), -1)
        weights = mx.where(weights >= border, weights, 0.0)
    if sampling.min_p > 0:
        weights = mx.where(weights >= sampling.min_p * weights.max(-1, keepdims=True), weights, 0.0)
    return weights
