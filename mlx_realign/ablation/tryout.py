# SPDX-License-Identifier: Apache-2.0
"""Which direction and how much of it, by completions: a few candidates at a few weights, no weight of the model touched.

What the first token says of a candidate (select.py) is cheap and can mislead: a behaviour may come back a few tokens
later, and embeddings, which are left alone, write the direction too, so that a weight above 1 may be needed to make up
for them. The least that suffices is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..policy import Policy
from ..writers import Writer
from .edit import plan
from .measure import divergences
from .scorers import broken, plain
from .trial import Forced, Slots, completions

WEIGHTS = (1.0, 1.25, 1.5, 1.75, 2.0)
ENOUGH = 0.02  # share of behaviour left, above the least, that is as good as the least
KL_TOKENS = 8  # of the base's completions


@dataclass(frozen=True)
class Tried:
    """One candidate at one weight."""

    name: str  # "block 12, last", "per block, mean"
    weight: float
    left: float  # share of the positives that show the behaviour, or are broken
    kl: float  # mean over the first tokens of the base's completions of the negatives, nats
    broken: float  # share of the negatives


def try_out(
    policy: Policy,
    writers: Sequence[Writer],
    candidates: Mapping[str, np.ndarray | Mapping[int, np.ndarray]],
    positives: Sequence[Sequence[int]],
    negatives: Sequence[Sequence[int]],
    *,
    markers: Sequence[str],
    weights: Sequence[float] = WEIGHTS,
    max_kl: float = 0.1,
    max_new_tokens: int = 64,
    share: Callable[[Writer], float] = lambda _: 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Tried], Tried | None]:
    """All that were tried, and the one to take; None where the base itself does not show the behaviour by its markers.

    candidates: by name, a direction [d] for all writers or one by block. share: what a writer's weight is times. Of a
    candidate, weights are raised until nothing is left or the KL is too large.
    """
    marks = [plain(marker) for marker in markers]
    first = next(iter(candidates.values()))
    width = len(first) if isinstance(first, np.ndarray) else len(next(iter(first.values())))

    def left(slot: int, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
        ids = completions(slots, slot, prompts, max_new_tokens)
        texts = [policy.tokenizer.decode(one) for one in ids]
        bad = np.array([broken(text) for text in texts])
        shows = np.array([any(mark in plain(text) for mark in marks) for text in texts])
        return float((shows | bad).mean()), float(bad.mean())

    tried: list[Tried] = []
    with Slots(policy, writers, 1, width) as slots:
        if left(0, positives)[0] < 0.5:
            return [], None
        said = completions(slots, 0, negatives, KL_TOKENS - 1)
        both = zip(negatives, said, strict=True)
        forced = [Forced([*prompt, *ids], len(prompt) - 1) for prompt, ids in both]
        base = slots._states(0, forced)
        for name, directions in candidates.items():
            for weight in weights:
                say(f"{name}, weight {weight:g}")
                slots.set(1, plan(writers, directions, lambda writer, weight=weight: weight * share(writer)))
                kl = float(divergences(policy, base, slots._states(1, forced)).mean())
                too_far = kl > max_kl and any(one.kl <= max_kl for one in tried)
                if too_far:
                    break
                tried.append(Tried(name, weight, left(1, positives)[0], kl, left(1, negatives)[1]))
                if tried[-1].left == 0 or kl > max_kl:
                    break
    return tried, pick(tried, max_kl)


def pick(tried: Sequence[Tried], max_kl: float) -> Tried:
    """Of those within the KL (all, where none is), the least KL among those that leave about the least behaviour."""
    within = [one for one in tried if one.kl <= max_kl] or [min(tried, key=lambda one: one.kl)]
    least = min(one.left + one.broken for one in within)
    return min((one for one in within if one.left + one.broken <= least + ENOUGH), key=lambda one: one.kl)


def table(tried: Sequence[Tried], chosen: Tried | None) -> Table:
    """For the terminal."""
    drawn = Table(box=box.SIMPLE, title="tried on prompts that the direction is from", title_justify="left")
    for name in ("direction", "weight", "behaviour left", "negatives broken", "KL"):
        drawn.add_column(name, justify="left" if name == "direction" else "right")
    for one in tried:
        numbers = (f"{one.weight:g}", f"{one.left:.0%}", f"{one.broken:.0%}", f"{one.kl:.3f}")
        drawn.add_row(one.name, *numbers, style="bold" if one is chosen else "")
    return drawn


def plain_values(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """As JSON."""
    return [asdict(one) for one in tried]
