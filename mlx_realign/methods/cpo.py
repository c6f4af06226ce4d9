# SPDX-License-Identifier: Apache-2.0
"""Contrastive preference optimization and its relatives SimPO and AlphaPO: prefer chosen without any reference.

CPO (Xu et al. 2024, arXiv:2401.08417) is DPO with a uniform reference and a likelihood term on chosen; SimPO
(arXiv:2405.14734) compares mean log-probs with a target margin; AlphaPO (arXiv:2501.03884) bends them. Unit: one pair.

Reading: log-probs per completion, summed or per token -> margin -> loss per pair, beside cpo_alpha times the negative
log-likelihood of chosen (mean over the window's tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .. import losses
from ..batch import Batch, Example, LossOutput, Scores
from ..errors import UserError
from ..preference import check_beta, check_smoothing, nll_weight

FORMAT = "pairs"
LEARNING_RATE = 1e-5

PER_TOKEN = ("ipo", "simpo", "alphapo")  # these compare mean log-probs
USUAL_BETA = {  # default, and the range that makes sense
    "simpo": (2.0, 1.0, 20.0),
    "alphapo": (2.0, 1.0, 20.0),
    "": (0.1, 0.001, 1.0),
}


@dataclass(frozen=True)
class Config:
    """Settings of --method cpo."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    """sigmoid, hinge, ipo: CPO; simpo, with --cpo-alpha 0: SimPO; alphapo: the same with --alpha bending rewards."""
    beta: float | None = None
    """Scale of the margin. Default: 0.1; 2 for simpo and alphapo, which compare log-probs per token."""
    cpo_alpha: float | None = None
    """Weight of the likelihood of chosen. Default: 1; 0 for simpo and alphapo."""
    gamma: float = 0.5
    """Target margin of simpo and alphapo, in units of beta times log-prob (not the paper's gamma / beta)."""
    alpha: float | None = None
    """AlphaPO's bend of the reward, any loss type: 0 is none. Default: 0; 0.25 for alphapo."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, below 0.5; not for hinge and ipo."""
    margin_scale: float = 0.0
    """Demand this much times the row's margin (or difference of scores) more; not for ipo."""

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_smoothing(self.label_smoothing)
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise UserError(f"--label-smoothing would do nothing with --loss-type {self.loss_type}: drop it")
        if self.margin_scale and self.loss_type == "ipo":
            raise UserError("--margin-scale would do nothing with --loss-type ipo: drop it")
        if self.cpo_alpha is not None and not 0 <= self.cpo_alpha < float("inf"):
            raise UserError(f"--cpo-alpha must be 0 or more, got {self.cpo_alpha}")

    @property
    def per_token(self) -> bool:
        """Whether mean log-probs are compared, not sums."""
        return self.loss_type in PER_TOKEN

    @property
    def scale(self) -> float:
        """beta, as set or by default."""
        return USUAL_BETA.get(self.loss_type, USUAL_BETA[""])[0] if self.beta is None else self.beta

    @property
    def likelihood(self) -> float:
        """cpo_alpha, as set or by default."""
        return float(self.loss_type not in ("simpo", "alphapo")) if self.cpo_alpha is None else self.cpo_alpha

    @property
    def bend(self) -> float:
        """alpha, as set or by default."""
        return 0.25 * (self.loss_type == "alphapo") if self.alpha is None else self.alpha


def reference(config: Config) -> str | None:
    """No reference."""
    return None


def notes(config: Config) -> list[str]:
    """What looks like a mistake."""
    found, (usual, low, high) = [], USUAL_BETA.get(config.loss_type, USUAL_BETA[""])
    if not low <= config.scale <= high:
        found.append(
            f"--beta {config.beta} is unusual for {config.loss_type}, used with {low:g} to {high:g} ({usual:g})"
        )
    if config.bend and not config.per_token:
        found.append(
            f"--alpha bends summed log-probs with --loss-type {config.loss_type}: of long answers they explode"
        )
    return found


def window(examples: Sequence[Example], config: Config, _: object = None) -> dict[str, mx.array]:
    """The token mean of the likelihood is over the whole window, whatever its micro-batches."""
    return {"nll_weight": nll_weight(examples)}


def loss(scores: Scores, batch: Batch, config: Config) -> LossOutput:
    """Sum over pairs."""
    pair = losses.pairs(scores, batch, margin_scale=config.margin_scale)
    trained = losses.chosen_mask(batch)
    nll = losses.nll(mx.where(trained, scores.logps, 0.0)).sum()
    logps = [pair.chosen, pair.rejected]
    if config.per_token:
        logps = [pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length]
    chosen, rejected = (losses.alphapo(x, config.bend) for x in logps)
    one = mx.ones_like(chosen)  # what is compared is per token already where it should be
    bent = pair._replace(chosen=chosen, rejected=rejected, chosen_length=one, rejected_length=one)
    values = _values(bent, config)
    if (tied := losses.tied(batch)) is not None:  # a pair of equals counts half in either order
        values = (values + _values(bent.swapped(tied), config)) / 2
    metrics = losses.reward_metrics(config.scale * chosen, config.scale * rejected, *logps)
    metrics |= {"nll_loss": (nll, trained.sum().astype(mx.float32))} | losses.token_metrics(scores, trained)
    total = values.sum() + config.likelihood * nll * batch.extras["nll_weight"]
    return LossOutput(total, mx.array(float(values.shape[0])), metrics)


def _values(pair: losses.Pair, config: Config) -> mx.array:
    if config.loss_type in ("simpo", "alphapo"):
        return losses.simpo(pair, beta=config.scale, gamma=config.gamma, label_smoothing=config.label_smoothing)
    if config.loss_type == "sigmoid":
        return losses.sigmoid(pair, beta=config.scale, label_smoothing=config.label_smoothing)
    return {"hinge": losses.hinge, "ipo": losses.ipo}[config.loss_type](pair, beta=config.scale)
