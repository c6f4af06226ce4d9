# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on completions: every assistant turn is trained, no prompt token is. One unit = one token.

Reading: prompt + completion -> policy -> log-probs of the trained tokens -> their negative mean over the whole
accumulation window (token-weighted; not a mean of micro-batch means).
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .. import losses
from ..batch import Batch, LossOutput, Scores

FORMAT = "sft"
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Config:
    """Settings of --method sft."""

    loss_type: Literal["nll", "dft"] = "nll"
    """nll: likelihood; dft: each token weighted by its own probability (arXiv:2508.05629), gentler on the unlikely."""


def reference(config: Config) -> str | None:
    """No reference."""
    return None


def loss(scores: Scores, batch: Batch, config: Config) -> LossOutput:
    """Sum over trained tokens."""
    per_token = {"nll": losses.nll, "dft": losses.dft}[config.loss_type](scores.logps)
    total = mx.where(batch.mask, per_token, 0.0).sum()
    return LossOutput(total, batch.mask.sum().astype(mx.float32), losses.token_metrics(scores, batch.mask))
