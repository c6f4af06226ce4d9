# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, unreduced, hyperparameters by keyword only. Log-probs are float32 nats.

A function here that takes a `Pair` and gives an array is a preference loss, found by its name (`--loss-type sigmoid`).
Below, r_w and r_l are a pair's log-ratios to the reference, chosen and rejected, and s(x) is log sigmoid(x). Names are
those of TRL 1.16 where it has the loss.
"""

import inspect
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .batch import Batch, Scores

Metrics = dict[str, tuple[mx.array, mx.array]]

COUPLED = ("aot", "aot_unpaired")
"""Losses that compare the pairs of a batch with one another: it cannot be cut into parts or micro-batches."""


ZERO = mx.array(0.0)


class Pair(NamedTuple):
    """N preference pairs, float32 [N] each: log-probs summed over the completion, and completion lengths in tokens."""

    chosen: mx.array
    rejected: mx.array
    ref_chosen: mx.array
    ref_rejected: mx.array
    chosen_length: mx.array
    rejected_length: mx.array
    margin: mx.array = ZERO
    """What the pair's own margin demands, in units of beta times log-ratio (losses that take one)."""

    @property
    def chosen_ratio(self) -> mx.array:
        """r_w, nats [N]."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> mx.array:
        """r_l, nats [N]."""
        return self.rejected - self.ref_rejected

    @property
    def difference(self) -> mx.array:
        """r_w - r_l, nats [N]."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_difference(self) -> mx.array:
        """r_w - r_l, each per token of its completion, nats [N]."""
        return self.chosen_ratio / self.chosen_length - self.rejected_ratio / self.rejected_length

    def swapped(self, which: mx.array) -> "Pair":
        """The pairs of a mask bool [N] the other way round; a demanded margin goes with them."""
        c, r, ref_c, ref_r, chosen_length, rejected_length, margin = self
        turned = Pair(r, c, ref_r, ref_c, rejected_length, chosen_length, margin)
        return Pair(*(mx.where(which, other, own) for own, other in zip(self, turned, strict=True)))


def names() -> list[str]:
    """Every preference loss here."""
    found = []
    for name, function in inspect.getmembers(sys.modules[__name__], inspect.isfunction):
        notes = list(inspect.get_annotations(function).values())
        if function.__module__ == __name__ and notes[:1] == [Pair] and notes[-1] is mx.array:
            found.append(name)
    return found


def options(function: Callable[..., mx.array]) -> list[str]:
    """Hyperparameters of a loss, by name."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


# Tokens. -----------------------------------------------------------------------------------------------------------


def nll(logps: mx.array) -> mx.array:
    """Negative log-likelihood per token. logps float32 [...] -> float32 [...]."""
    return -logps


def dft(logps: mx.array) -> mx.array:
    """Dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629, eq. 9: each token weighted by its own probability.

    logps float32 [...] -> float32 [...]; no gradient through the weight, as in TRL.
    """
    return -mx.stop_gradient(mx.exp(logps)) * logps


# Pairs. ------------------------------------------------------------------------------------------------------------


def sigmoid(pair: Pair, *, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """-s(beta (r_w - r_l) - margin). Direct preference optimization, Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    label_smoothing in [0, 0.5]: probability that a label is flipped, the conservative DPO of Mitchell 2023 (cDPO); TRL
    1.16 accepts that setting for this loss and ignores it. margin: DPO with an offset, arXiv:2402.10571, eq. 3.
    """
    return _smoothed(beta * pair.difference - pair.margin, label_smoothing)


def hinge(pair: Pair, *, beta: float) -> mx.array:
    """max(0, 1 + margin - beta (r_w - r_l)). SLiC, arXiv:2305.10425, as RSO normalises it, arXiv:2309.06657, eq. 11."""
    return nn.relu(1 + pair.margin - beta * pair.difference)


def ipo(pair: Pair, *, beta: float) -> mx.array:
    """(r_w / L_w - r_l / L_l - 1 / (2 beta))^2. Azar et al. 2023, arXiv:2310.12036, eq. 17, per token as in TRL."""
    return (pair.mean_difference - 1 / (2 * beta)).square()


def robust(pair: Pair, *, beta: float, label_smoothing: float) -> mx.array:
    """Unbiased where a share label_smoothing < 0.5 of the labels is flipped. arXiv:2403.00409, eq. 12."""
    margin = beta * pair.difference
    clean, flipped = nn.log_sigmoid(margin), nn.log_sigmoid(-margin)
    return (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)


def exo_pair(pair: Pair, *, beta: float, label_smoothing: float) -> mx.array:
    """KL(policy's preference || labels smoothed by label_smoothing > 0). EXO, arXiv:2402.00856, eq. 16."""
    margin = beta * pair.difference
    chosen = mx.sigmoid(margin) * (nn.log_sigmoid(margin) - math.log1p(-label_smoothing))
    return chosen + mx.sigmoid(-margin) * (nn.log_sigmoid(-margin) - math.log(label_smoothing))


def nca_pair(pair: Pair, *, beta: float) -> mx.array:
    """-s(beta r_w) - (s(-beta r_w) + s(-beta r_l)) / 2: keeps chosen likely. NCA, arXiv:2402.05369."""
    chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
    return -nn.log_sigmoid(chosen) - 0.5 * (nn.log_sigmoid(-chosen) + nn.log_sigmoid(-rejected))


def bco_pair(pair: Pair, *, beta: float) -> mx.array:
    """-s(beta r_w) - s(-beta r_l): a classifier of good and bad. BCO, arXiv:2404.04656, without its reward shift."""
    return -nn.log_sigmoid(beta * pair.chosen_ratio) - nn.log_sigmoid(-beta * pair.rejected_ratio)


def sppo_hard(pair: Pair, *, beta: float) -> mx.array:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2. SPPO, arXiv:2405.00675, eq. 4.7 with certain winners."""
    return (pair.chosen_ratio - 0.5 / beta).square() + (pair.rejected_ratio + 0.5 / beta).square()


def aot(pair: Pair, *, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """The whole batch's differences should dominate the reference's, compared in sorted order. arXiv:2406.05882, eq. 7.

    Entry i belongs to no pair of its own, but to the i-th smallest ones.
    """
    ours, theirs = mx.sort(pair.chosen - pair.rejected), mx.sort(pair.ref_chosen - pair.ref_rejected)
    return _smoothed(beta * (ours - theirs), label_smoothing)


def aot_unpaired(pair: Pair, *, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """As aot, of the log-ratios of chosen against those of rejected: pairs need not belong together."""
    chosen, rejected = mx.sort(pair.chosen_ratio), mx.sort(pair.rejected_ratio)
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero(pair: Pair, *, beta: float) -> mx.array:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): for chosen better than the policy. APO, arXiv:2408.06266, eq. 7."""
    return 1 - mx.sigmoid(beta * pair.chosen_ratio) + mx.sigmoid(beta * pair.rejected_ratio)


def apo_down(pair: Pair, *, beta: float) -> mx.array:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)): for chosen worse than the policy. arXiv:2408.06266, eq. 8."""
    return mx.sigmoid(beta * pair.chosen_ratio) + 1 - mx.sigmoid(beta * pair.difference)


def discopop(pair: Pair, *, beta: float, discopop_tau: float = 0.05) -> mx.array:
    """Between logistic and exponential loss, by sigmoid(beta (r_w - r_l) / tau). DiscoPOP, arXiv:2406.08414, eq. 5."""
    margin = beta * pair.difference
    share = margin / discopop_tau
    # One exponential of a sum: far below zero exp(-margin) alone would overflow while its weight vanishes.
    return mx.exp(nn.log_sigmoid(share) - margin) - nn.log_sigmoid(margin) * mx.sigmoid(-share)


def sigmoid_norm(pair: Pair, *, beta: float) -> mx.array:
    """-s(beta (r_w / L_w - r_l / L_l) - margin): DPO per token, arXiv:2411.15124, section 5.1; wants a larger beta."""
    return -nn.log_sigmoid(beta * pair.mean_difference - pair.margin)


def dpop(pair: Pair, *, beta: float, dpop_lambda: float) -> mx.array:
    """-s(beta (r_w - r_l - lambda max(0, -r_w))). DPO-Positive (Smaug), arXiv:2402.13228, eq. 3.

    The penalty, inside the sigmoid, forbids paying for the margin with the likelihood of chosen.
    """
    penalty = nn.relu(-pair.chosen_ratio)
    return -nn.log_sigmoid(beta * (pair.difference - dpop_lambda * penalty))


def simpo(pair: Pair, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> mx.array:
    """-s(beta (mean log-prob of chosen - of rejected) - gamma - margin). SimPO, arXiv:2405.14734, eq. 6.

    gamma is the target margin itself, not its ratio to beta.
    """
    difference = pair.chosen / pair.chosen_length - pair.rejected / pair.rejected_length
    return _smoothed(beta * difference - gamma - pair.margin, label_smoothing)


def odds_ratio(pair: Pair, *, beta: float) -> mx.array:
    """-beta s(log odds of chosen - log odds of rejected). ORPO, Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7."""
    odds = log_odds(pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length)
    return -beta * nn.log_sigmoid(odds)


def log_odds(chosen: mx.array, rejected: mx.array) -> mx.array:
    """log (odds(chosen) / odds(rejected)), odds p / (1 - p), of mean log-probs per token; nats, same shape."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - e^x) for x <= 0, right to the last digits at both ends (Maechler 2012); x is cut at -1e-6: p = 1."""
    x = mx.minimum(x, -1e-6)
    near = x > -math.log(2)
    # Each branch only sees what it can take: a NaN in the one not chosen would poison the gradient.
    small, large = mx.where(near, x, -1.0), mx.where(near, -1.0, x)
    return mx.where(near, mx.log(-mx.expm1(small)), mx.log1p(-mx.exp(large)))


def divergence(ratio: mx.array, kind: str, alpha: float = 0.5) -> mx.array:
    """f'(e^ratio): the score that stands for the log-ratio under another divergence. arXiv:2309.16240, table 1.

    kind: reverse_kl (the log-ratio itself), forward_kl, js_divergence or alpha_divergence with its alpha.
    """
    if kind == "forward_kl":
        return 1 - mx.exp(mx.minimum(-ratio, 80.0))  # float32 ends at e^88
    if kind == "js_divergence":
        return math.log(2) + nn.log_sigmoid(ratio)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return (mx.exp(mx.minimum((alpha - 1) * ratio, 80.0)) - 1) / (alpha - 1)
    return ratio


def alphapo(logp: mx.array, alpha: float) -> mx.array:
    """(1 - e^(-alpha logp)) / alpha, the reward of AlphaPO, arXiv:2501.03884, eq. 6; alpha 0 is the log-prob itself."""
    return (1 - mx.exp(-alpha * logp)) / alpha if alpha else logp


def _smoothed(margin: mx.array, label_smoothing: float) -> mx.array:
    """-(1 - e) s(margin) - e s(-margin)."""
    if not label_smoothing:
        return -nn.log_sigmoid(margin)
    return -(1 - label_smoothing) * nn.log_sigmoid(margin) - label_smoothing * nn.log_sigmoid(-margin)


# Single completions. -----------------------------------------------------------------------------------------------


def kto(
    ratio: mx.array,
    label: mx.array,
    *,
    beta: float,
    kl: mx.array,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """Kahneman-Tversky optimization, Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8 -> float32 [R].

    ratio [R]: log-ratio to the reference; label [R]: 1 good, 0 bad; kl: the reference point z >= 0, no gradient.
    """
    good, bad = 1 - mx.sigmoid(beta * (ratio - kl)), 1 - mx.sigmoid(beta * (kl - ratio))
    return mx.where(label > 0.5, desirable_weight * good, undesirable_weight * bad)


def apo_zero_unpaired(
    ratio: mx.array,
    label: mx.array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """kto with 0 as its reference point: apo_zero (arXiv:2408.06266, eq. 7) without pairs -> float32 [R]."""
    good, bad = 1 - mx.sigmoid(beta * ratio), mx.sigmoid(beta * ratio)
    return mx.where(label > 0.5, desirable_weight * good, undesirable_weight * bad)


# From a batch. -----------------------------------------------------------------------------------------------------


def pairs(scores: Scores, batch: Batch, *, ld_alpha: float | None = None, margin_scale: float = 0.0) -> Pair:
    """Every (chosen, rejected) pair of the batch: the first completion of a prompt against each other one.

    extras: `row` int32 [R], 0 for chosen; `ref_logps` float32 [R] or, with ld_alpha, `ref_token_logps` [R, Lc], zero
    where the batch has none; with margin_scale `margin` [P], else the difference of `scores` [R], NaN counting as 0.
    ld_alpha: weight of the tokens beyond the shorter completion's length, LD-DPO, arXiv:2409.06411, eq. 9.
    """
    chosen, rejected = sides(batch)
    length = batch.mask.sum(-1).astype(mx.float32)
    if ld_alpha is None:
        total = scores.logps.sum(-1)
        ref = batch.extras.get("ref_logps", mx.zeros_like(total))
        own, their = (total[chosen], total[rejected]), (ref[chosen], ref[rejected])
    else:
        place = mx.cumsum(batch.mask.astype(mx.float32), axis=-1)
        common = mx.minimum(length[chosen], length[rejected])[:, None]
        weigh = lambda logps, side: (logps[side] * mx.where(place[side] <= common, 1.0, ld_alpha)).sum(-1)  # noqa: E731
        tokens = batch.extras.get("ref_token_logps", mx.zeros_like(scores.logps))
        own, their = ((weigh(logps, chosen), weigh(logps, rejected)) for logps in (scores.logps, tokens))
    margin = margin_scale * _margins(batch, chosen, rejected) if margin_scale else ZERO
    return Pair(*own, *their, length[chosen], length[rejected], margin)


def sides(batch: Batch) -> tuple[mx.array, mx.array]:
    """Completion rows of chosen and rejected of every pair, int32 [N] each."""
    rows, prompts = batch.mask.shape[0], batch.prompt.shape[0]
    # False first: rejected rows, then the chosen one of each prompt in turn.
    order = mx.argsort(batch.extras["row"] == 0)
    rejected, chosen = mx.sort(order[: rows - prompts]), mx.sort(order[rows - prompts :])
    return chosen[batch.row_prompt[rejected]], rejected


def tied(batch: Batch) -> mx.array | None:
    """bool [N]: pairs of equals, by extras `tie` [P]; None where the batch has none."""
    if "tie" not in batch.extras:
        return None
    _, rejected = sides(batch)
    return batch.extras["tie"][batch.row_prompt[rejected]] > 0.5  # NaN, of rows that say nothing, is False


def _margins(batch: Batch, chosen: mx.array, rejected: mx.array) -> mx.array:
    missing = mx.full(chosen.shape, mx.nan)
    scores, margin = batch.extras.get("scores"), batch.extras.get("margin")
    found = missing if scores is None else scores[chosen] - scores[rejected]
    if margin is not None:
        own = margin[batch.row_prompt[rejected]]
        found = mx.where(mx.isnan(own), found, own)
    return mx.where(mx.isnan(found), 0.0, found)


def chosen_mask(batch: Batch) -> mx.array:
    """bool [R, Lc]: trained tokens of chosen completions."""
    return batch.mask & (batch.extras["row"] == 0)[:, None]


def wpo_weights(scores: Scores, batch: Batch) -> mx.array:
    """float32 [R]: how likely a completion is for the policy, exp(mean_t (logp_t - log sum_v p_v^2)), no gradient.

    WPO, arXiv:2406.11827, eq. 2, aligned so that a token as likely as a sampled one counts 1.
    """
    assert scores.log_sum_sq is not None
    aligned = mx.where(batch.mask, scores.logps - scores.log_sum_sq, 0.0)
    return mx.stop_gradient(mx.exp(aligned.sum(-1) / mx.maximum(batch.mask.sum(-1), 1)))


def pair_metrics(pair: Pair, *, beta: float) -> Metrics:
    """Rewards (beta times log-ratio to the reference) and summed log-probs, under TRL's names."""
    return reward_metrics(beta * pair.chosen_ratio, beta * pair.rejected_ratio, pair.chosen, pair.rejected)


def reward_metrics(chosen: mx.array, rejected: mx.array, chosen_logps: mx.array, rejected_logps: mx.array) -> Metrics:
    """Of rewards and log-probs [N] of the two sides."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    count = mx.array(float(chosen.shape[0]))
    return {name: (value.sum(), count) for name, value in values.items()}


def token_metrics(scores: Scores, mask: mx.array) -> Metrics:
    """Entropy (nats) and share of tokens that were the most likely one, over the tokens of a mask bool [R, Lc]."""
    count = mask.sum().astype(mx.float32)
    return {
        "entropy": ((scores.entropy * mask).sum(), count),
        "mean_token_accuracy": ((scores.correct * mask).sum(), count),
    }
