# SPDX-License-Identifier: Apache-2.0
"""The arrays that travel between data, policy and losses. NamedTuples, because compiled functions take nothing else."""

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


class Batch(NamedTuple):
    """P prompts x R completions.

    A row of the forward pass is [prompt's last token] + completion[:-1]; what it predicts is the completion itself.
    """

    prompt: mx.array  # int32 [P, Lp] left-padded, its last token included
    prompt_pad: mx.array  # int32 [P] number of pad columns on the left
    completion: mx.array  # int32 [R, Lc] right-padded
    row_prompt: mx.array  # int32 [R] completion row -> prompt row, non-decreasing
    mask: mx.array  # bool [R, Lc] True = trained on, aligned with the completion token itself (the target)
    positions: mx.array  # int32 [N] flat indices into [R * Lc]: all trained ones, then untrained ones up to a bucket
    extras: dict[str, mx.array]  # ref_logps float32 [R], advantages ... only what the method needs


class Scores(NamedTuple):
    """What the policy says of a batch's completion tokens; zero where the mask is False."""

    logps: mx.array  # float32 [R, Lc] log-prob of each completion token, nats
    entropy: mx.array  # float32 [R, Lc] of the next-token distribution, nats; no gradient
    correct: mx.array  # float32 [R, Lc] 1 where the token was the most likely one; no gradient
    # Only where a method needs them (methods.needs):
    log_sum_sq: mx.array | None = None  # float32 [R, Lc] log sum_v p_v^2 of the next-token distribution; no gradient
    prompt_logps: mx.array | None = None  # float32 [P, Lp - 1] log-prob of each prompt token but the first; 0 for pads


class LossOutput(NamedTuple):
    """Sums, never means: the loop divides once, over the whole accumulation window."""

    total: mx.array  # float32 scalar, sum over units
    # float32 scalar, number of units (tokens for SFT, pairs for DPO)
    count: mx.array  # pyright: ignore[reportIncompatibleMethodOverride]
    metrics: dict[str, tuple[mx.array, mx.array]]  # name -> (sum, count), each divided over the window too
