# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization: chosen over rejected, relative to the policy as this stage began. Unit: one pair.

Reading: a prompt and its completions -> log-probs summed per completion -> minus the reference's, computed once and
cached -> one or several losses per pair, weighted -> mean over the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .. import losses
from ..batch import Batch, Example, LossOutput, Scores
from ..errors import UserError
from ..preference import check_beta, check_names, check_smoothing, nll_weight

FORMAT = "pairs"
LEARNING_RATE = 1e-5

TAKE_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
TAKE_MARGIN = ("sigmoid", "sigmoid_norm", "hinge")
TAKE_SMOOTHING = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
OTHERS = ("simpo", "odds_ratio")  # pair losses without a reference: methods cpo and orpo
USUAL_BETA = {"sigmoid_norm": (5.0, 1.0, 20.0), "": (0.1, 0.001, 1.0)}  # default, and the range that makes sense


def names() -> list[str]:
    """What --loss-type takes."""
    return [*(name for name in losses.names() if name not in OTHERS), "sft"]


@dataclass(frozen=True)
class Config:
    """Settings of --method dpo."""

    beta: float | None = None
    """Preference temperature: larger keeps the policy nearer to the reference. Default: 0.1; 5 for sigmoid_norm."""
    loss_type: tuple[str, ...] = ("sigmoid",)
    """sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
    discopop, sigmoid_norm, dpop, sft; several, separated by commas, are added up with --loss-weights."""
    loss_weights: tuple[float, ...] = ()
    """One number per loss type; default: 1 each."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, below 0.5: cDPO for sigmoid; also robust, exo_pair (needs it), aot."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What keeps the policy near the reference (arXiv:2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence."""
    ld_alpha: float | None = None
    """Weight, 0 to 1, of tokens beyond the shorter completion's length (LD-DPO); default: 1, all count."""
    use_weighting: bool = False
    """Weight pairs by how likely the policy itself is to say them (WPO, arXiv:2406.11827)."""
    margin_scale: float = 0.0
    """Demand this much times the row's margin (or difference of scores) more: sigmoid, sigmoid_norm, hinge."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    dpop_lambda: float = 50.0
    """Weight of dpop's penalty on chosen falling below the reference."""
    reference: Literal["init", "base"] = "init"
    """init: the policy as this stage began; base: the model without any adapter."""

    def __post_init__(self) -> None:
        check_names("loss-type", self.loss_type, names())
        check_beta(self.beta)
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"--loss-weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} loss types: one each"
            )
        check_smoothing(self.label_smoothing)
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise UserError("--loss-type exo_pair needs --label-smoothing above 0, such as 1e-3")
        for flag, value, default, takers in (
            ("label-smoothing", self.label_smoothing, 0.0, TAKE_SMOOTHING),
            ("f-divergence-type", self.f_divergence_type, "reverse_kl", TAKE_DIVERGENCE),
            ("margin-scale", self.margin_scale, 0.0, TAKE_MARGIN),
        ):
            if value != default and not set(takers) & set(self.loss_type):
                raise UserError(f"--{flag} is for the loss types {', '.join(takers)}; without one it would do nothing")
        if self.use_weighting and set(losses.COUPLED) & set(self.loss_type):
            raise UserError("--use-weighting weighs single pairs, and aot and aot_unpaired sort them: drop one")
        if self.loss_type == ("sft",) and (self.use_weighting or self.ld_alpha is not None):
            flag = "use-weighting" if self.use_weighting else "ld-alpha"
            raise UserError(f"--{flag} is for losses of pairs; with --loss-type sft alone it would do nothing")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"--ld-alpha must be from 0 to 1, got {self.ld_alpha}")

    @property
    def weights(self) -> tuple[float, ...]:
        """One per loss type."""
        return self.loss_weights or (1.0,) * len(self.loss_type)

    def beta_of(self, name: str) -> float:
        """As set, or the default of a loss."""
        return USUAL_BETA.get(name, USUAL_BETA[""])[0] if self.beta is None else self.beta


def reference(config: Config) -> str | None:
    """Which reference the loss needs."""
    return config.reference if config.loss_type != ("sft",) else None


def needs(config: Config) -> frozenset[str]:
    """What the losses ask of batch and policy beside summed log-probs."""
    asked = {"whole_batch"} if set(config.loss_type) & set(losses.COUPLED) else set()
    asked |= {"ref_tokens"} if config.ld_alpha is not None else set()
    return frozenset(asked | ({"log_sum_sq"} if config.use_weighting else set()))


def notes(config: Config) -> list[str]:
    """What looks like a mistake."""
    found = []
    for name in config.loss_type:
        usual, low, high = USUAL_BETA.get(name, USUAL_BETA[""])
        if name != "sft" and not low <= config.beta_of(name) <= high:
            found.append(
                f"--beta {config.beta} is unusual for {name}, which is used with {low:g} to {high:g} ({usual:g})"
            )
    return found


def window(examples: Sequence[Example], config: Config, _: object = None) -> dict[str, mx.array]:
    """The token mean of sft is over the whole window, whatever its micro-batches."""
    return {"nll_weight": nll_weight(examples)} if "sft" in config.loss_type else {}


def loss(scores: Scores, batch: Batch, config: Config) -> LossOutput:
    """Sum over pairs."""
    pair = losses.pairs(scores, batch, ld_alpha=config.ld_alpha, margin_scale=config.margin_scale)
    trained = losses.chosen_mask(batch)
    count = mx.array(float(pair.chosen.shape[0]))
    metrics = losses.pair_metrics(pair, beta=config.beta_of(config.loss_type[0]))
    weights = mx.array(1.0)
    if config.use_weighting:
        of_row = losses.wpo_weights(scores, batch)
        chosen, rejected = losses.sides(batch)
        weights = of_row[chosen] * of_row[rejected]
        metrics["weights"] = weights.sum(), count
    total = mx.array(0.0)
    for name, weight in zip(config.loss_type, config.weights, strict=True):
        if name == "sft":
            nll = losses.nll(mx.where(trained, scores.logps, 0.0)).sum()
            metrics["nll_loss"] = nll, trained.sum().astype(mx.float32)
            total = total + weight * nll * batch.extras["nll_weight"]
        else:
            total = total + weight * (weights * _values(name, pair, losses.tied(batch), config)).sum()
    return LossOutput(total, count, metrics | losses.token_metrics(scores, trained))


def _values(name: str, pair: losses.Pair, tied: mx.array | None, config: Config) -> mx.array:
    """[N]; a pair of equals counts half in either order."""
    function = getattr(losses, name)
    own = {option: getattr(config, option) for option in losses.options(function) if option != "beta"}
    measure = lambda pair: function(_scored(name, pair, config), beta=config.beta_of(name), **own)  # noqa: E731
    return measure(pair) if tied is None else (measure(pair) + measure(pair.swapped(tied))) / 2


def _scored(name: str, pair: losses.Pair, config: Config) -> losses.Pair:
    """The pair with scores of another divergence in the place of log-ratios."""
    if config.f_divergence_type == "reverse_kl" or name not in TAKE_DIVERGENCE:
        return pair
    kind, alpha = config.f_divergence_type, config.f_alpha_divergence_coef
    chosen, rejected = (losses.divergence(r, kind, alpha) for r in (pair.chosen_ratio, pair.rejected_ratio))
    zero = mx.zeros_like(chosen)
    return pair._replace(chosen=chosen, rejected=rejected, ref_chosen=zero, ref_rejected=zero)
