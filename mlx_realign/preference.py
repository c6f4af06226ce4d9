# SPDX-License-Identifier: Apache-2.0
"""What the preference methods share: checks of their settings, and the likelihood term beside a pair's loss."""

from collections.abc import Sequence

import mlx.core as mx

from .batch import Example
from .errors import UserError
from .flags import nearest


def check_names(flag: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """UserError for a name there is not, one named twice, or none at all."""
    if not chosen:
        raise UserError(f"--{flag} needs at least one of {', '.join(known)}")
    for name in chosen:
        if name not in known:
            raise UserError(
                f"--{flag} {name}: there is no such loss.{nearest(name, known)} There are {', '.join(known)}."
            )
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--{flag} {','.join(chosen)}: a loss is named twice; use --loss-weights")


def check_beta(beta: float | None) -> None:
    """UserError unless above 0."""
    if beta is not None and not 0 < beta < float("inf"):
        raise UserError(f"--beta must be above 0, got {beta}")


def check_smoothing(value: float) -> None:
    """UserError unless in [0, 0.5)."""
    if not 0 <= value < 0.5:
        raise UserError(f"--label-smoothing must be at least 0 and below 0.5, got {value}")


def nll_weight(examples: Sequence[Example], *, prompts: bool = False) -> mx.array:
    """float32 scalar: pairs over chosen tokens of a window.

    A loss counts pairs, so a token mean beside it is its sum times this. prompts: the tokens of prompts count as well,
    but for the first, which nothing predicts.
    """
    pairs = sum(len(e.completions) - 1 for e in examples)
    tokens = sum(int(e.completions[0].mask.sum()) + prompts * (len(e.prompt) - 1) for e in examples)
    return mx.array(pairs / max(tokens, 1))
