# SPDX-License-Identifier: Apache-2.0
"""Odds ratio preference optimization: learn chosen by likelihood and prefer it over rejected, in one stage, without a
reference. Hong et al. 2024, arXiv:2403.07691. Unit: one pair.

Reading: log-probs per completion -> means per token -> log of the ratio of their odds -> its log-sigmoid, times beta,
beside the negative log-likelihood of chosen (mean over the window's tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import losses
from ..batch import Batch, Example, LossOutput, Scores
from ..preference import check_beta, nll_weight

FORMAT = "pairs"
LEARNING_RATE = 8e-5


@dataclass(frozen=True)
class Config:
    """Settings of --method orpo."""

    beta: float = 0.1
    """Weight of the odds ratio beside the likelihood (the paper's lambda)."""
    nll_on_prompt: bool = False
    """Likelihood of prompt and chosen, as TRL has it, instead of chosen alone."""

    def __post_init__(self) -> None:
        check_beta(self.beta)


def reference(config: Config) -> str | None:
    """No reference."""
    return None


def needs(config: Config) -> frozenset[str]:
    """Log-probs of the prompts' own tokens, where they are trained."""
    return frozenset({"prompt_logps"} if config.nll_on_prompt else ())


def window(examples: Sequence[Example], config: Config, _: object = None) -> dict[str, mx.array]:
    """The token mean of the likelihood is over the whole window, whatever its micro-batches."""
    return {"nll_weight": nll_weight(examples, prompts=config.nll_on_prompt)}


def loss(scores: Scores, batch: Batch, config: Config) -> LossOutput:
    """Sum over pairs."""
    pair = losses.pairs(scores, batch)
    trained = losses.chosen_mask(batch)
    nll, tokens = losses.nll(mx.where(trained, scores.logps, 0.0)).sum(), trained.sum().astype(mx.float32)
    if config.nll_on_prompt:
        assert scores.prompt_logps is not None
        nll = nll + losses.nll(scores.prompt_logps).sum()
        tokens = tokens + mx.maximum(batch.prompt_lengths - 1, 0).sum()
    ratio = losses.odds_ratio(pair, beta=config.beta)
    if (tied := losses.tied(batch)) is not None:  # a pair of equals counts half in either order
        ratio = (ratio + losses.odds_ratio(pair.swapped(tied), beta=config.beta)) / 2
    count = mx.array(float(ratio.shape[0]))
    chosen, rejected = pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length
    odds = losses.log_odds(chosen, rejected)
    metrics = losses.reward_metrics(config.beta * chosen, config.beta * rejected, chosen, rejected)
    metrics |= {
        "nll_loss": (nll, tokens),
        "log_odds_chosen": (odds.sum(), count),
        "log_odds_ratio": (nn.log_sigmoid(odds).sum(), count),
    }
    total = ratio.sum() + nll * batch.extras["nll_weight"]
    return LossOutput(total, count, metrics | losses.token_metrics(scores, trained))
