# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, unreduced, hyperparameters by keyword only. Log-probs are float32 nats.

A function here that takes a `Pair` is a preference loss, found by its name (`--loss-type sigmoid`).
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .batch import Batch, Scores

Metrics = dict[str, tuple[mx.array, mx.array]]


class Pair(NamedTuple):
    """N preference pairs, float32 [N] each: log-probs summed over the completion, and completion lengths in tokens."""

    chosen: mx.array
    rejected: mx.array
    ref_chosen: mx.array
    ref_rejected: mx.array
    chosen_length: mx.array
    rejected_length: mx.array


def nll(logps: mx.array) -> mx.array:
    """Negative log-likelihood per token. logps float32 [...] -> float32 [...]."""
    return -logps


def dft(logps: mx.array) -> mx.array:
    """Dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629, eq. 9: each token weighted by its own probability.

    logps float32 [...] -> float32 [...]; no gradient through the weight, as in TRL.
    """
    return -mx.stop_gradient(mx.exp(logps)) * logps


def sigmoid(pair: Pair, *, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """Direct preference optimization, Rafailov et al. 2023, arXiv:2305.18290, eq. 7 -> float32 [N].

    label_smoothing in [0, 0.5): probability that a label is flipped, the conservative DPO of Mitchell 2023 (cDPO).
    TRL 1.16 accepts that setting for this loss and ignores it.
    """
    margin = beta * ((pair.chosen - pair.ref_chosen) - (pair.rejected - pair.ref_rejected))
    if not label_smoothing:
        return -nn.log_sigmoid(margin)
    return -(1 - label_smoothing) * nn.log_sigmoid(margin) - label_smoothing * nn.log_sigmoid(-margin)


def pairs(scores: Scores, batch: Batch) -> Pair:
    """Every (chosen, rejected) pair of the batch: the first completion of a prompt against each other one.

    extras: `row` int32 [R], 0 for chosen; `ref_logps` float32 [R], zero where the batch has none.
    """
    rows, prompts = batch.mask.shape[0], batch.prompt.shape[0]
    order = mx.argsort(
        batch.extras["row"] == 0
    )  # False first: rejected rows, then the chosen one of each prompt in turn
    rejected, chosen = order[: rows - prompts], mx.sort(order[rows - prompts :])
    rejected = mx.sort(rejected)
    chosen = chosen[batch.row_prompt[rejected]]
    total, length = scores.logps.sum(-1), batch.mask.sum(-1).astype(mx.float32)
    ref = batch.extras.get("ref_logps", mx.zeros_like(total))
    return Pair(total[chosen], total[rejected], ref[chosen], ref[rejected], length[chosen], length[rejected])


def pair_metrics(pair: Pair, *, beta: float) -> Metrics:
    """Rewards (beta times log-ratio to the reference) and summed log-probs, under TRL's names."""
    chosen, rejected = beta * (pair.chosen - pair.ref_chosen), beta * (pair.rejected - pair.ref_rejected)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "logps/chosen": pair.chosen,
        "logps/rejected": pair.rejected,
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
