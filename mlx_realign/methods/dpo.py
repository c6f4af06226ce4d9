# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization: chosen over rejected, relative to the policy as this stage began. Unit: one pair.

Reading: a prompt and its completions -> log-probs summed per completion -> minus the reference's, computed once and
cached -> margin -> loss per pair -> mean over the window.
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .. import losses
from ..batch import Batch, LossOutput, Scores
from ..errors import UserError

FORMAT = "pairs"
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Config:
    """Settings of --method dpo."""

    beta: float = 0.1
    """Preference temperature: larger keeps the policy nearer to the reference."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    """sigmoid: arXiv:2305.18290, eq. 7."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, in [0, 0.5) (cDPO)."""
    reference: Literal["init", "base"] = "init"
    """init: the policy as this stage began; base: the model without any adapter."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise UserError(f"--beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label-smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")


def reference(config: Config) -> str | None:
    """Which reference the loss needs."""
    return config.reference


def loss(scores: Scores, batch: Batch, config: Config) -> LossOutput:
    """Sum over pairs."""
    pair = losses.pairs(scores, batch)
    values = getattr(losses, config.loss_type)(pair, beta=config.beta, label_smoothing=config.label_smoothing)
    chosen = batch.mask & (batch.extras["row"] == 0)[:, None]
    metrics = losses.pair_metrics(pair, beta=config.beta) | losses.token_metrics(scores, chosen)
    return LossOutput(values.sum(), mx.array(float(values.shape[0])), metrics)
