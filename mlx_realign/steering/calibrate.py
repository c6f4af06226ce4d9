# SPDX-License-Identifier: Apache-2.0
"""How strong is strong: the coefficient at which a steering departs from the base model by a set amount.

The measure is the Kullback-Leibler divergence KL(steered || base) of next-token distributions, in nats, token by token
over the base model's own greedy completions, teacher-forced; the budget is for a high quantile of it, for a few tokens
that go astray spoil a text. KL grows about as the square of the coefficient, so the search is a secant in logarithms.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .. import data, rollout
from ..batch import Batch, Completion, Example
from ..distributions import divergence, log_probs
from ..errors import UserError
from ..policy import Policy
from ..sampling import Sampling
from .apply import steer
from .operators import SHARES
from .spec import Steer

AT_ONCE = 4096  # tokens of prompts and completions computed together
ROWS = 256  # logits of so many tokens exist at a time
ROUNDING = 1e-6  # nats: what the divergence of a distribution from itself, computed twice, stays below
SLOPE = 2.0  # d log KL / d log coefficient before anything is known
STEEPEST, FLATTEST = 4.0, 0.5


class Evaluation(NamedTuple):
    """What a coefficient does: KL per token, in nats, over all tokens."""

    coefficient: float
    kl: float  # the quantile that has the budget
    mean: float
    largest: float


class Calibration(NamedTuple):
    """The coefficient found, and what was tried, in order."""

    coefficient: float
    kl: float  # nats, the quantile at this coefficient
    reached: bool  # False: the budget could not be spent to within the tolerance, and this comes nearest
    table: list[Evaluation]
    tokens: int  # that it was measured on


def calibrate(
    policy: Policy,
    given: Steer,
    prompts: Sequence[Sequence[int]],
    *,
    budget_nats: float = 1.0,
    quantile: float = 0.95,
    tokens: int = 20,
    tolerance: float = 0.05,
    most: int = 8,
) -> Calibration:
    """The coefficient whose `quantile` of KL per token over `tokens` greedy tokens of each prompt is the budget.

    Begins at the given coefficient (1 where it is 0) and keeps its sign. Operators that go a share of the way end at 1.
    tolerance: of the budget, relative; most: evaluations. UserError for numbers out of their range, or a steering
    that changes nothing.
    """
    ranges = {
        "budget_nats": (0 < budget_nats < math.inf, "above 0"),
        "quantile": (0 < quantile <= 1, "above 0 and at most 1"),
        "tokens": (tokens >= 1, "at least 1"),
        "most": (most >= 1, "at least 1"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise UserError(f"calibrate: {name} must be {expected}.")
    if not prompts:
        raise UserError("calibrate: there are no prompts to measure on.")
    bench = Bench(policy, prompts, tokens)
    cap = 1.0 if given.operator in SHARES else math.inf
    sign = math.copysign(1.0, given.coefficient or 1.0)
    search = Search(budget_nats, abs(given.coefficient) or 1.0, cap)
    table: list[Evaluation] = []
    with steer(policy, given) as steering:
        while len(table) < most:
            steering.set(coefficient=sign * search.next)
            kl = bench.divergences()
            table.append(
                Evaluation(sign * search.next, float(np.quantile(kl, quantile)), float(kl.mean()), float(kl.max()))
            )
            if abs(table[-1].kl / budget_nats - 1) <= tolerance or not search.learn(table[-1].kl):
                break
    if all(one.kl <= ROUNDING for one in table):
        raise UserError(
            "calibrate: this steering changes no token's distribution at any coefficient tried. Steer other blocks or "
            "positions, or prompts that meet its condition."
        )
    best = min(table, key=lambda one: abs(math.log(max(one.kl, 1e-12) / budget_nats)))
    reached = abs(best.kl / budget_nats - 1) <= tolerance
    return Calibration(best.coefficient, best.kl, reached, table, bench.count)


class Search:
    """Coefficients to try, above 0: a secant in logarithms until the budget lies between two, then between these."""

    def __init__(self, budget: float, first: float, cap: float) -> None:
        self.budget, self.next, self.cap = budget, min(first, cap), cap
        self.known: list[tuple[float, float]] = []  # (coefficient, KL), in the order tried
        self.sides: list[bool] = []  # whether each was too strong

    def learn(self, kl: float) -> bool:
        """Take in what `next` gave, and move on; False where nothing is left to try."""
        self.known.append((self.next, min(max(kl, 1e-9), 1e9)))
        self.sides.append(self.known[-1][1] >= self.budget)
        weak = max((point for point in self.known if point[1] < self.budget), default=None)
        strong = min((point for point in self.known if point[1] >= self.budget), default=None)
        if weak and strong and weak[0] >= strong[0]:  # more was less: the curve turns
            return False
        self.next = min(self._between(weak, strong) if weak and strong else self._beyond(), self.cap)
        return all(abs(self.next / tried - 1) > 1e-6 for tried, _ in self.known)

    def _between(self, weak: tuple[float, float], strong: tuple[float, float]) -> float:
        """False position; half way where the same end has moved twice, for the curve is not straight there."""
        (a, low), (b, high) = weak, strong
        share = math.log(self.budget / low) / math.log(high / low)
        if len(self.sides) > 2 and self.sides[-1] == self.sides[-2]:
            share = 0.5
        return a * (b / a) ** min(max(share, 0.05), 0.95)

    def _beyond(self) -> float:
        """Out of the last two, or of one and the slope that a square has; at most eightfold."""
        at, kl = self.known[-1]
        slope = SLOPE
        if len(self.known) > 1:
            before, other = self.known[-2]
            slope = min(max(math.log(kl / other) / math.log(at / before), FLATTEST), STEEPEST)
        return at * min(max((self.budget / kl) ** (1 / slope), 1 / 8), 8.0)


class Bench:
    """The base model's greedy completions, and what it says of each of their tokens."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.policy = policy
        asked = Sampling(max_new_tokens=tokens, temperature=0)
        made = rollout.rollout(policy, [list(prompt) for prompt in prompts], asked)
        examples = [
            Example(np.array(prompt, np.int32), (Completion(one.tokens, np.ones(len(one.tokens), bool)),), 0, "", {})
            for prompt, (one,) in zip(prompts, made, strict=True)
        ]
        self.batches = _batches(examples)
        self.base = [self._hidden(batch) for batch in self.batches]
        self.count = sum(len(hidden) for hidden in self.base)

    def divergences(self) -> np.ndarray:
        """float64 [tokens]: KL(as the model is now || base), nats."""
        found = []
        for batch, base in zip(self.batches, self.base, strict=True):
            now = self._hidden(batch)
            for start in range(0, len(now), ROWS):
                part = slice(start, start + ROWS)
                found.append(np.array(divergence(self._log_probs(now[part]), self._log_probs(base[part]))))
        return np.nan_to_num(np.concatenate(found).astype(np.float64), nan=np.inf)  # a stream that ran over

    def _hidden(self, batch: Batch) -> mx.array:
        """Hidden states [N, D] that predict the batch's completion tokens, evaluated."""
        states = self.policy.states(batch).completion
        picked = states.reshape(-1, states.shape[-1])[batch.positions[: int(np.array(batch.mask).sum())]]
        mx.eval(picked)
        return picked

    def _log_probs(self, hidden: mx.array) -> mx.array:
        return log_probs(self.policy.body.logits(hidden))


def _batches(examples: list[Example]) -> list[Batch]:
    """In batches of like length, AT_ONCE tokens or so each."""
    ordered = sorted(examples, key=lambda e: len(e.prompt))
    batches: list[list[Example]] = [[]]
    for example in ordered:
        longest = len(example.prompt) + max(len(e.completions[0].tokens) for e in [*batches[-1], example])
        if batches[-1] and longest * (len(batches[-1]) + 1) > AT_ONCE:
            batches.append([])
        batches[-1].append(example)
    return [data.collate(batch) for batch in batches]
