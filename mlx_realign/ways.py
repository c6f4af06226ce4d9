# SPDX-License-Identifier: Apache-2.0
"""Which way of generating is right on the very model that was loaded: the first that gives what a plain pass gives.

    grouped    prompts are computed once, and attention reads them once for all their rows
    copied     prompts are computed once, their keys and values copied to each row
    together   rows without padding over mlx-lm's own caches
    alone      the same, one row at a time
    whole      no cache: each token by a pass over the whole text, one row at a time

Each is tried on random tokens of a few columns when it is needed first, with prompts of unequal lengths and attention
windows shorter than they are, against the model's own logits for each row alone, unpadded and without a cache.
"""

import mlx.core as mx
import numpy as np

from . import noise, taps
from .decoding import Decoder, Row
from .errors import said
from .forward import shrunk_windows
from .policy import Policy
from .sampling import Sampling, numbers
from .stepping import Stepper

SHARED, OWN = ("grouped", "copied"), ("together", "alone")
TOGETHER = (*SHARED, "together")  # many rows at a time
# Nats. Rounding comes to 1e-4 in float32 on real models and to 0.1 in bfloat16, where a router may also take another
# expert for a token: of short floats the median of each row counts. Keys that are missed move every later token.
LIMIT = {mx.float32: 1e-2, mx.bfloat16: 0.3, mx.float16: 0.1}
NOTES = {
    "copied": "a prompt's keys and values are copied to each of its rollouts",
    "together": "rollouts do not share prompts' keys and values",
    "alone": "rollouts are made one at a time, which is slow",
    "whole": "each token takes a pass over the whole text, which is slow",
}


def check(policy: Policy) -> tuple[str, str | None]:
    """(the way this policy generates, a line where that is not the best for its kind); found once."""
    reason = None
    for way in (*SHARED, *OWN) if policy.sharing and not policy.stateful else OWN:
        wrong = tried(policy, way)
        if wrong is None:
            return way, reason and f"{NOTES[way]}: {reason}"
        reason = reason if way in SHARED and reason else wrong
    return "whole", f"{NOTES['whole']}: {reason}"


def notes(policy: Policy) -> list[str]:
    """What `check` has to say."""
    note = check(policy)[1]
    return [note] if note else []


def shares(policy: Policy) -> bool:
    """Whether rows that are generated share their prompts, and others can join them on the way."""
    return check(policy)[0] in SHARED


def decoder(policy: Policy, way: str, sampling: Sampling) -> Decoder | Stepper:
    """What makes tokens in this way."""
    if way in SHARED:
        return Decoder(policy, sampling, grouped=way == "grouped")
    return Stepper(policy, sampling, cached=way != "whole")


def tried(policy: Policy, way: str) -> str | None:
    """What is wrong with a way on this model, or None; tried once."""
    if way not in policy.tried:
        with taps.untapped(policy.model), shrunk_windows(policy.model):
            try:
                policy.tried[way] = _judged(policy, _made(policy, way))
            except Exception as error:  # whatever an architecture raises, there is another way
                policy.tried[way] = said(error)
    return policy.tried[way]


def _made(policy: Policy, way: str) -> list[Row]:
    """Two completions of a prompt of 7 tokens and one of another of 5, which joins them or not; one leaves early."""
    rng, maker = np.random.default_rng(0), decoder(policy, way, Sampling())
    first, second = (rng.integers(3, max(4, policy.vocabulary - 1), n, dtype=np.int32) for n in (7, 5))
    rows = [Row(prompt, i, numbers((0, j), 8)) for j, (prompt, i) in enumerate([(first, 0), (first, 0), (second, 1)])]
    if isinstance(maker, Decoder):
        maker.compiled = None  # what is compiled is the same, and takes longer to make than this
    if way == "alone":
        maker.exchange([], rows[:1])
        for _ in range(4):
            maker.step()
        return rows[:1]
    begun = rows[:2] if maker.joins else rows
    maker.exchange([], begun)
    maker.step()
    if maker.joins:
        maker.exchange(begun, rows[2:])
    for kept in (rows, rows[1:]):
        if len(kept) < len(rows):
            maker.exchange(kept, [])
        maker.step()
        maker.step()
    return rows


def _judged(policy: Policy, rows: list[Row]) -> str | None:
    """What is wrong with their log-probs, or None; where the model's own are not finite nothing can be said."""
    worst, dtype = 0.0, noise.judged_as(policy.dtype)
    for row in rows:
        text = np.concatenate([row.prompt, np.array(row.tokens, np.int32)])
        logits = policy.model(mx.array(text[None, :-1]))[0, len(row.prompt) - 1 :].astype(mx.float32)
        logps = logits - mx.logsumexp(logits, -1, keepdims=True)
        expected = np.array(mx.take_along_axis(logps, mx.array(text[len(row.prompt) :, None]), -1))[:, 0]
        gaps = np.abs(np.array(row.logps, np.float32) - expected)[np.isfinite(expected)]
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        if gaps.size:
            worst = max(worst, float(gaps.max() if dtype == mx.float32 else np.median(gaps)))
    return None if worst <= LIMIT[dtype] else f"log-probs differ by {worst:.1e} nats"
