# SPDX-License-Identifier: Apache-2.0
"""The arrays that travel between data, policy and losses. NamedTuples, because compiled functions take nothing else."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class Completion(NamedTuple):
    """One tokenised completion. mask[t] is True iff tokens[t] itself is trained on."""

    tokens: np.ndarray  # int32 [L]
    mask: np.ndarray  # bool [L]


class Example(NamedTuple):
    """One row of data: a prompt and the completions that share it (SFT 1; pairs chosen, rejected, ...; groups n)."""

    prompt: np.ndarray  # int32 [Lp >= 1]; plain text: its first token
    completions: tuple[Completion, ...]
    line: int  # 1-based line in its file, 0 where there is none
    key: str  # hash of prompt and completions: what a cached number of this row depends on
    extras: dict[str, Any]  # numbers of the row that a method may use: scores, margin, label ...


class Strip(NamedTuple):
    """Completions of a batch that are computed side by side, narrower than its widest one."""

    rows: mx.array  # int32 [r] which completions
    tokens: mx.array  # int32 [r, W] what is fed for them


class Pack(NamedTuple):
    """The rows of a batch as they lie in packed ones; see packing."""

    tokens: mx.array  # int32 [K, W] what is fed
    documents: mx.array  # int32 [R, Lc] where each fed token lies in them, flat; K * W where a row has ended
    back: mx.array  # int32 [K * W] the other way: flat in [R, Lc], R * Lc where a packed row is not filled


class Batch(NamedTuple):
    """P prompts x R completions.

    A row of the forward pass is [prompt's last token] + completion[:-1]; what it predicts is the completion itself.
    An exact batch has no padding before its prompts, so that its attention needs no mask: of each prompt the first
    tokens are shared, and the rest, `lead`, stands in front of each of its completions, never trained.
    """

    prompt: mx.array  # int32 [P, Lp] left-padded, its last token included
    prompt_pad: mx.array | None  # int32 [P] number of pad columns on the left; None: an exact batch
    completion: mx.array  # int32 [R, Lc] right-padded
    row_prompt: mx.array  # int32 [R] completion row -> prompt row, non-decreasing
    mask: mx.array  # bool [R, Lc] True = trained on, aligned with the completion token itself (the target)
    positions: mx.array  # int32 [N] flat indices into [R * Lc]: all trained ones, then untrained ones up to a bucket
    extras: dict[str, mx.array]  # ref_logps float32 [R], advantages ... only what the method needs
    lead: mx.array | None = None  # int32 [P], of an exact batch: tokens of the prompt in front of each completion
    strips: tuple[Strip, ...] = ()  # every completion in one of them; none: all side by side
    pack: Pack | None = None  # of an exact batch that shares nothing
    planned: bool = True  # whether its shapes are among those that come again; others are not worth a trace

    @property
    def pad(self) -> mx.array:
        """int32 [P]: number of pad columns before each prompt."""
        return mx.zeros(self.prompt.shape[0], mx.int32) if self.prompt_pad is None else self.prompt_pad

    @property
    def ahead(self) -> mx.array:
        """int32 [P]: how many tokens of each prompt stand in front of its completions."""
        return mx.zeros(self.prompt.shape[0], mx.int32) if self.lead is None else self.lead

    @property
    def prompt_lengths(self) -> mx.array:
        """int32 [P]: tokens of each prompt."""
        return self.prompt.shape[1] - self.pad + self.ahead


def placed(batch: Batch, values: Sequence[np.ndarray]) -> mx.array:
    """float32 [R, Lc] of numbers per completion token, one array for each completion; zero elsewhere."""
    found = np.zeros(batch.mask.shape, np.float32)
    for row, start, own in zip(found, _starts(batch), values, strict=True):
        row[start : start + len(own)] = own
    return mx.array(found)


def taken(batch: Batch, found: mx.array, lengths: Iterable[int]) -> list[np.ndarray]:
    """Of [R, Lc] the numbers of each completion's own tokens, float32."""
    rows = zip(np.array(found).astype("<f4"), _starts(batch), lengths, strict=True)
    return [row[start : start + n] for row, start, n in rows]


def _starts(batch: Batch) -> np.ndarray:
    """int [R]: the column at which each completion's own tokens begin."""
    return np.array(batch.ahead)[np.array(batch.row_prompt)]


class Scores(NamedTuple):
    """What the policy says of a batch's completion tokens; zero where the mask is False."""

    logps: mx.array  # float32 [R, Lc] log-prob of each completion token, nats
    entropy: mx.array  # float32 [R, Lc] of the next-token distribution, nats; no gradient
    correct: mx.array  # float32 [R, Lc] 1 where the token was the most likely one; no gradient
    # Only where a method needs them (methods.needs):
    log_sum_sq: mx.array | None = None  # float32 [R, Lc] log sum_v p_v^2 of the next-token distribution; no gradient
    prompt_logps: mx.array | None = None  # float32 [P, n] log-prob of each prompt token but the first, 0 elsewhere


class LossOutput(NamedTuple):
    """Sums, never means: the loop divides once, over the whole accumulation window."""

    total: mx.array  # float32 scalar, sum over units
    # float32 scalar, number of units (tokens for SFT, pairs for DPO)
    count: mx.array  # pyright: ignore[reportIncompatibleMethodOverride]
    metrics: dict[str, tuple[mx.array, mx.array]]  # name -> (sum, count), each divided over the window too
