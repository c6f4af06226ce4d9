# SPDX-License-Identifier: Apache-2.0
"""Which direction and how much of it, by completions: a few candidates at a few weights, the model itself untouched.

What the first token says of a candidate (select.py) is cheap and can mislead: a behaviour may come back a few tokens
later, and embeddings, which are left alone, write the direction too, so that a weight above 1 may be needed to make up
for them. Weights are raised until the behaviour is gone on a few prompts; the best candidates are then tried on all of
them, at weights around that one, and the least that suffices is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from rich import box
from rich.table import Table

from ..policy import Policy
from ..ways import shares
from ..writers import Writer
from .edit import plan
from .measure import divergences
from .scorers import broken, plain
from .trial import Forced, Job, Runner, Slots, completions

LADDER = (1.0, 1.25, 1.5, 2.0)
STEP, RAISES = 0.125, 3  # of the weights tried on all prompts, around the one that sufficed on a few
LEAST, LOWER = 0.5, 4  # weight below which none is looked for, and steps down to it from the first of the ladder
FEW, FINALISTS = 12, 4  # prompts that all candidates are tried on; candidates that go on to all prompts
GONE = 1 / 30  # share of the behaviour left that counts as none
KL_TOKENS = 8  # of the base's completions

Rows = np.ndarray | Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Tried:
    """One candidate at one weight."""

    name: str
    weight: float
    left: float  # share of the positives that show the behaviour, or are broken
    kl: float  # first token, mean over the negatives, nats
    worst: float  # 95th percentile over negatives of each one's mean over the base's first tokens
    prompts: int  # positives it was tried on

    @property
    def gone(self) -> bool:
        """Whether no more than one prompt in thirty, or one at all, is left."""
        return self.left <= max(GONE, 1.01 / self.prompts)


class Attempt(Protocol):
    """Tries a candidate at a weight, on all prompts; None where its KL is above the most, unless `always`."""

    def __call__(self, name: str, weight: float, always: bool = False) -> Tried | None: ...


class Trier:
    """Runs candidates in a slot of the policy."""

    def __init__(
        self, slots: Slots, writers: Sequence[Writer], negatives: Sequence[Sequence[int]], marks: list[str], most: int
    ) -> None:
        self.slots, self.policy, self.writers = slots, slots.policy, writers
        self.marks, self.most = marks, most
        said = completions(slots, 0, negatives, KL_TOKENS - 1)
        both = zip(negatives, said, strict=True)
        self.forced = [Forced([*prompt, *ids], len(prompt) - 1) for prompt, ids in both]
        self.base = slots.states(0, self.forced)

    def put(self, rows: Rows, weight: Callable[[Writer], float]) -> tuple[float, float]:
        """Into the slot; KL of the first token, and the 95th percentile over prompts of that of several."""
        self.slots.set(1, plan(self.writers, rows, weight))
        kls = divergences(self.policy, self.base, self.slots.states(1, self.forced))
        ends = np.cumsum([len(text.tokens) - text.first for text in self.forced])
        each = np.split(kls, ends[:-1])
        return float(np.mean([k[0] for k in each])), float(np.quantile([k.mean() for k in each], 0.95))

    def left(self, slot: int, prompts: Sequence[Sequence[int]]) -> float:
        """Share of the completions that show the behaviour or are broken; a row stops at its first marker."""
        if not shares(self.policy):
            ids = completions(self.slots, slot, prompts, self.most)
            texts = [self.policy.tokenizer.decode(one) for one in ids]
            return float(np.mean([self.shows(text) or broken(text) for text in texts]))
        runner = Runner(self.slots, prompts, 64)
        for i, prompt in enumerate(prompts):
            runner.add(Job(0, 0, i), slot, prompt)
        bad = 0
        while runner.waiting or runner.live:
            for row, text, ended in runner.step():
                shows, whole = self.shows(text), ended or len(row.tokens) >= self.most
                row.done = shows or whole
                bad += shows or (whole and broken(text))
        return bad / len(prompts)

    def shows(self, text: str) -> bool:
        """Whether a marker is in it."""
        said = plain(text)
        return any(mark in said for mark in self.marks)


def try_out(
    policy: Policy,
    writers: Sequence[Writer],
    candidates: Mapping[str, Rows],
    positives: Sequence[Sequence[int]],
    negatives: Sequence[Sequence[int]],
    *,
    markers: Sequence[str],
    weight: float | None = None,
    max_kl: float = 0.1,
    max_new_tokens: int = 64,
    share: Callable[[Writer], float] = lambda _: 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Tried], Tried | None]:
    """All that were tried, and the one to take; None where the base itself does not show the behaviour by its markers.

    candidates: by name, one direction for all writers ([d] or [1, d]) or one by block. weight: the only one to try.
    share: what a writer's weight is times. A weight whose KL is above max_kl is not tried, unless it is the first.
    """
    first = next(iter(candidates.values()))
    width = (first if isinstance(first, np.ndarray) else next(iter(first.values()))).shape[-1]
    ladder = LADDER if weight is None else (weight,)
    with Slots(policy, writers, 1, width) as slots:
        trier = Trier(slots, writers, negatives, [plain(marker) for marker in markers], max_new_tokens)
        if trier.left(0, positives) < 0.5:
            return [], None

        def attempt(
            name: str, weight: float, always: bool = False, prompts: Sequence[Sequence[int]] = positives
        ) -> Tried | None:
            say(f"{name}, weight {weight:g}")
            kl, worst = trier.put(candidates[name], lambda writer: weight * share(writer))
            if kl > max_kl and not always:
                return None
            return Tried(name, weight, trier.left(1, prompts), kl, worst, len(prompts))

        rough: dict[str, list[Tried]] = {}
        for name in candidates:
            for step in ladder:
                one = attempt(name, step, step == ladder[0], positives[:FEW])
                if one is None:
                    break
                rough.setdefault(name, []).append(one)
                if one.gone or one.kl > max_kl:
                    break
        best = sorted(rough, key=lambda name: order(min(rough[name], key=lambda one: one.left), max_kl))
        final: list[Tried] = []
        for name in best[:FINALISTS]:
            final += _around(name, rough[name], attempt, weight is None)
    return final, min(final, key=lambda one: order(one, max_kl))


def _around(name: str, rough: Sequence[Tried], attempt: Attempt, several: bool) -> list[Tried]:
    """A candidate on all prompts at the weight that sufficed on a few, and at the least one near it that suffices.

    The first is there whatever its KL, so that there is always something to compare; `order` puts it last.
    """
    last = min(rough, key=lambda one: (one.left, one.weight))
    first = attempt(name, last.weight, True)
    assert first is not None
    found = [first]
    if not several or first.left >= 0.5:
        return found
    down = first.left == 0  # where little is left, a little more is worth a look
    for weight in _lower(first.weight) if down else [first.weight + n * STEP for n in range(1, RAISES + 1)]:
        one = attempt(name, weight)
        found += [one] if one else []
        if one is None and down:
            continue  # above the most KL, as the first was: less may be within it
        if one is None or (not one.gone if down else one.left == 0):
            break
    return found


def _lower(weight: float) -> list[float]:
    """Weights below one that leaves nothing; below the ladder's first only where that sufficed, else it left some."""
    enough = weight == LADDER[0]
    below = [weight - n * STEP for n in range(1, (LOWER if enough else RAISES) + 1)]
    return [one for one in below if one >= (LEAST if enough else LADDER[0])]


def order(one: Tried, max_kl: float) -> tuple[Any, ...]:
    """Small is better: within the KL, nothing left, little change where it is largest; else little left.

    Among those that leave next to nothing, a point of behaviour weighs as much as 0.01 nats.
    """
    return (one.kl > max_kl, not one.gone, one.worst + one.left if one.gone else one.left, one.kl)


def table(tried: Sequence[Tried], chosen: Tried | None) -> Table:
    """For the terminal."""
    drawn = Table(box=box.SIMPLE, title="tried on completions", title_justify="left")
    for name in ("direction of", "weight", "behaviour left", "KL", "KL, 95%"):
        drawn.add_column(name, justify="left" if name == "direction of" else "right")
    for one in tried:
        numbers = (f"{one.weight:g}", f"{one.left:.0%}", f"{one.kl:.3f}", f"{one.worst:.3f}")
        drawn.add_row(one.name, *numbers, style="bold" if one is chosen else "")
    return drawn


def plain_values(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """As JSON."""
    return [asdict(one) for one in tried]
