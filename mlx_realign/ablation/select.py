# SPDX-License-Identifier: Apache-2.0
"""Which block and position to take the direction from: by what ablating and adding it does, before anything is written.

Arditi et al. 2024 (arXiv:2406.11717, section 2.3): bypass, how much of the behaviour is left on the positives without
the direction; induce, how much of it the negatives show with the direction added in its block; and the KL to the base
on the negatives. The candidate that leaves least is taken, among those that induce and whose KL is small. All is read
at the last prompt token, where the behaviour begins, from log-odds of the tokens it begins with; where nobody says how
it shows, from the final state there, by cosine (COSMIC, arXiv:2506.00085, reads several blocks so).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich import box
from rich.table import Table

from .. import taps
from ..distributions import log_probs
from ..policy import Policy
from ..steerability import auroc
from ..writers import Writer
from .edit import plan
from .measure import divergences
from .trial import Forced, Slots

EARLY = 0.8  # share of the blocks; directions of later ones are of the next token, not of the behaviour
FIRST, SCREENED = 4, 16  # prompts that all candidates are tried on, and how many candidates then go on,
LEAST_EACH = 3  # of each position at least so many
CLEAR = 0.8  # AUROC of the log-odds of both sets, below which first tokens do not tell them apart

Source = tuple[float, int | str]  # block, also between two, and position from the prompt's end or "completion"


@dataclass(frozen=True)
class Candidate:
    """A direction and what it does, all means over prompts."""

    block: float
    position: int | str
    bypass: float  # behaviour left on the positives with the direction ablated; lower is better
    induce: float = math.nan  # behaviour on the negatives with it added
    kl: float = math.nan  # KL(base || ablated) on the negatives, nats, first token
    refused: str = ""  # why it is not taken

    @property
    def source(self) -> Source:
        """Its key."""
        return self.block, self.position


class Chosen(NamedTuple):
    """The outcome."""

    best: Candidate
    candidates: list[Candidate]  # all that were looked at in full, best first
    read: str  # what the scores are: "log-odds" or "cosine"
    note: str | None  # what the user should know


class Reading(NamedTuple):
    """How strongly a final state [n, D] shows the behaviour, per row; 0 is in the middle of the two sets."""

    name: str
    base: tuple[float, float]  # means over positives and negatives as they are
    tokens: tuple[int, ...] = ()
    middle: np.ndarray = np.zeros(0)  # [D], of the means of both sets
    towards: np.ndarray = np.zeros(0)  # [D], from the negatives' mean to the positives'

    def scores(self, policy: Policy, states: mx.array) -> np.ndarray:
        """float64 [n]."""
        if self.tokens:
            return log_odds(log_probs(policy.body.logits(states)), self.tokens)
        away = np.array(states.astype(mx.float32)).astype(np.float64) - self.middle
        return away @ self.towards / np.maximum(np.linalg.norm(away, axis=1) * np.linalg.norm(self.towards), 1e-30)


def choose(
    policy: Policy,
    writers: Sequence[Writer],
    directions: Mapping[Source, np.ndarray],
    positives: Sequence[Sequence[int]],
    negatives: Sequence[Sequence[int]],
    *,
    tokens: Sequence[int] = (),
    weight: float = 1.0,
    max_kl: float = 0.1,
    screened: int = SCREENED,
) -> Chosen:
    """The best of `directions` (float64 [d], not normalised), tried on prompts (token ids) of both sets.

    tokens: with which answers that show the behaviour begin; (): unknown. All candidates are tried on the first few
    positives, the best of them in full.
    """
    late = EARLY * len(taps.blocks(policy.model))
    keys = [key for key in directions if 0 <= key[0] < late] or list(directions)
    note = None
    with Slots(policy, writers, 1, len(next(iter(directions.values())))) as slots:
        texts = [[Forced(prompt, len(prompt) - 1) for prompt in side] for side in (positives, negatives)]
        base = [slots.states(0, side) for side in texts]
        reading = tokens_reading(policy, base, tokens) if tokens else None
        if reading is None:
            reading = cosine_reading(policy, base)
            if tokens:
                note = "the first tokens do not tell the two sets apart: candidates are compared by their final states"

        def bypass(key: Source, count: int | None) -> float:
            slots.set(1, plan(writers, directions[key], weight))
            return float(reading.scores(policy, slots.states(1, texts[0][:count])).mean())

        found = []
        for key in _screened(keys, lambda key: bypass(key, FIRST), screened):
            left = bypass(key, None)
            kl = float(divergences(policy, base[1], slots.states(1, texts[1])).mean())
            induced = added(slots, taps.blocks(policy.model)[round(key[0])], directions[key], texts[1])
            induce = float(reading.scores(policy, induced).mean())
            found.append(_judged(Candidate(*key, left, induce, kl), reading, max_kl))
    found.sort(key=lambda c: (c.kl > max_kl, bool(c.refused), c.kl if c.kl > max_kl else c.bypass))
    if found[0].refused:
        note = f"no candidate passes (the best: {found[0].refused}); other prompts or --position may help"
    return Chosen(found[0], found, reading.name, note)


def _screened(keys: list[Source], score: Callable[[Source], float], most: int) -> list[Source]:
    """The best `most` candidates, shared out over the positions; all, where they are no more."""
    if len(keys) <= most:
        return keys
    scores = {key: score(key) for key in keys}
    positions = list(dict.fromkeys(position for _, position in keys))
    each = max(LEAST_EACH, most // len(positions))
    best = sorted(keys, key=scores.__getitem__)
    return [key for p in positions for key in [key for key in best if key[1] == p][:each]]


def _judged(candidate: Candidate, reading: Reading, max_kl: float) -> Candidate:
    """With the reason not to take it, where there is one."""
    numbers = (candidate.bypass, candidate.induce, candidate.kl)
    reason = ""
    if not all(map(math.isfinite, numbers)):
        reason = "not finite"
    elif candidate.kl > max_kl:
        reason = f"KL {candidate.kl:.2f} is above {max_kl:g}"
    elif candidate.induce <= max(0.0, reading.base[1]):
        reason = "does not induce the behaviour"
    return replace(candidate, refused=reason)


def added(slots: Slots, path: str, vector: np.ndarray, texts: Sequence[Forced]) -> mx.array:
    """Final states [n, D] with a vector [d] added to what the block at `path` gives, at every token."""
    held = mx.array(vector.astype(np.float32))
    slots.set(0, [])  # what texts begin with was computed without it
    handle = taps.put(slots.policy.model, path, lambda h, _: h + held.astype(h.dtype))
    try:
        found = slots.states(0, texts)
        mx.eval(found)
        return found
    finally:
        handle.remove()
        slots.set(0, [])


# ------------------------------------------------------------------ reading


def tokens_reading(policy: Policy, base: Sequence[mx.array], tokens: Sequence[int]) -> Reading | None:
    """By log-odds of first tokens; None where these do not tell positives from negatives."""
    scores = [log_odds(log_probs(policy.body.logits(states)), tokens) for states in base]
    if auroc(*scores) < CLEAR or scores[0].mean() <= 0:
        return None
    return Reading("log-odds", (float(scores[0].mean()), float(scores[1].mean())), tuple(tokens))


def cosine_reading(policy: Policy, base: Sequence[mx.array]) -> Reading:
    """By the cosine of (state - middle) with the way from the negatives' mean to the positives'."""
    means = [np.array(states.astype(mx.float32)).astype(np.float64).mean(0) for states in base]
    reading = Reading("cosine", (0.0, 0.0), (), (means[0] + means[1]) / 2, means[0] - means[1])
    sides = [float(reading.scores(policy, states).mean()) for states in base]
    return reading._replace(base=(sides[0], min(sides[1], 0.0)))


def log_odds(logps: mx.array, tokens: Sequence[int]) -> np.ndarray:
    """log p / (1 - p), float64 [n], p the probability of all `tokens` together in log-probs [n, V]."""
    p = np.array(mx.exp(logps[:, mx.array(sorted(tokens))]).sum(-1)).astype(np.float64)
    p = np.clip(p, 1e-8, 1 - 1e-8)
    return np.log(p) - np.log1p(-p)


def first_tokens(showing: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Tokens with which completions (token ids) that show the behaviour begin, and the others seldom."""
    begins = [[ids[0] for ids in side if len(ids)] for side in (showing, others)]
    shares = [{t: side.count(t) / len(side) for t in set(side)} for side in begins]
    return tuple(sorted(t for t, share in shares[0].items() if share >= 0.02 and share > 2 * shares[1].get(t, 0.0)))


# ------------------------------------------------------------------ for people


def table(chosen: Chosen) -> Table:
    """Candidates, best first, for the terminal."""
    drawn = Table(box=box.SIMPLE, title=f"where to take the direction from, by {chosen.read}", title_justify="left")
    for name in ("block", "position", "left", "induced", "KL", ""):
        drawn.add_column(name, justify="left" if not name else "right")
    for c in chosen.candidates:
        numbers = (f"{c.bypass:.2f}", f"{c.induce:.2f}", f"{c.kl:.3f}")
        drawn.add_row(str(c.block), str(c.position), *numbers, c.refused, style="bold" if c is chosen.best else "")
    return drawn


def plain(chosen: Chosen) -> dict[str, Any]:
    """As JSON."""
    return {"read": chosen.read, "note": chosen.note, "candidates": [asdict(c) for c in chosen.candidates]}
