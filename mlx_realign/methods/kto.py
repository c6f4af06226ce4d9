# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: good and bad completions that need not come in pairs. Ethayarajh et al. 2024,
arXiv:2402.01306. Unit: one completion.

Reading: log-ratio of a completion to the policy as this stage began -> against z, how far the policy has moved on
completions that answer another row's prompt -> a value between 0 and 1, turned round for bad ones -> mean over the
window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .. import losses
from ..batch import Batch, Example, LossOutput, Scores
from ..data import key_of
from ..errors import UserError
from ..preference import check_beta

FORMAT = "unpaired"
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Config:
    """Settings of --method kto."""

    beta: float = 0.1
    """Preference temperature: larger keeps the policy nearer to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto: against the estimated KL; apo_zero_unpaired: against 0, a third cheaper, any batch size."""
    desirable_weight: float = 1.0
    """Of good completions; with n good and m bad, this times n over undesirable_weight times m is best in 1 to 4/3."""
    undesirable_weight: float = 1.0
    """Of bad completions."""
    reference: Literal["init", "base"] = "init"
    """init: the policy as this stage began; base: the model without any adapter."""

    def __post_init__(self) -> None:
        check_beta(self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")


def reference(config: Config) -> str | None:
    """Which reference the loss needs."""
    return config.reference


def needs(config: Config) -> frozenset[str]:
    """Rows that lend their completions."""
    return frozenset({"other_rows"} if config.loss_type == "kto" else ())


def window(
    examples: Sequence[Example], config: Config, ratios: Callable[[list[Example]], mx.array]
) -> dict[str, mx.array]:
    """z: mean log-ratio of completions under the prompt of the next row of the window, at least 0, no gradient.

    As in TRL: each row lends its completion to the one after it. A row alone has no other: its z is 0.
    """
    if config.loss_type != "kto":
        return {}
    if len(examples) < 2:
        return {"kl": mx.array(0.0)}
    lenders = [examples[-1], *examples[:-1]]
    pairs = zip(examples, lenders, strict=True)
    mismatched = [
        Example(own.prompt, other.completions, own.line, key_of(own.prompt, other.completions), {})
        for own, other in pairs
    ]
    return {"kl": mx.maximum(ratios(mismatched).mean(), 0.0)}


def loss(scores: Scores, batch: Batch, config: Config) -> LossOutput:
    """Sum over completions."""
    label, logps = batch.extras["label"][batch.row_prompt], scores.logps.sum(-1)
    ratio = logps - batch.extras["ref_logps"]
    weights = {name: getattr(config, name) for name in ("desirable_weight", "undesirable_weight")}
    if config.loss_type == "kto":
        values = losses.kto(ratio, label, beta=config.beta, kl=batch.extras["kl"], **weights)
    else:
        values = losses.apo_zero_unpaired(ratio, label, beta=config.beta, **weights)
    count = mx.array(float(values.shape[0]))
    metrics: losses.Metrics = {}
    for side, mine in (("chosen", label), ("rejected", 1 - label)):
        metrics[f"rewards/{side}"] = (config.beta * ratio * mine).sum(), mine.sum()
        metrics[f"logps/{side}"] = (logps * mine).sum(), mine.sum()
    if config.loss_type == "kto":
        metrics["kl_mismatched"] = batch.extras["kl"] * count, count
    return LossOutput(values.sum(), count, metrics | losses.token_metrics(scores, batch.mask))
