# SPDX-License-Identifier: Apache-2.0
"""The micro-batches of a run, in an order that depends on the seed alone: a run that goes on sees the same ones."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import data, layout
from .batch import Batch, Example
from .config import TrainSettings
from .policy import Policy
from .reference import Reference


class Micro(NamedTuple):
    """One micro-batch: the place in the run that seeds its dropout, its rows, and the batch made of them."""

    place: int
    examples: list[Example]
    batch: Batch

    @property
    def tokens(self) -> int:
        """Tokens the model reads, each prompt once."""
        return sum(len(e.prompt) + sum(len(c.tokens) for c in e.completions) for e in self.examples)

    @property
    def lines(self) -> list[int]:
        """Where the rows stand in their file."""
        return [example.line for example in self.examples]


class Feed:
    """Training and held-out rows as micro-batches, with the reference's log-probs where the method needs them."""

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        settings: TrainSettings,
        rows: data.Dataset,
        held_out: data.Dataset | None,
        shared: "Shared",
    ) -> None:
        """shared: what the batches of a window, or of an evaluation, have in common (methods.shared)."""
        self.policy, self.shared = policy, shared
        self.reference, self.settings, self.rows, self.held_out = reference, settings, rows, held_out
        self.width = policy.width if policy.compiled and not policy.exact else (lambda n: n)
        self.plans: dict[int, list[np.ndarray]] = {}
        self.layout: layout.Layout | None = None
        self.per_epoch = len(self.plan(0))
        window = settings.gradient_accumulation
        epochs = max(1, round(settings.epochs * self.per_epoch))
        self.micro = settings.steps * window if settings.steps else epochs  # micro-batches of the whole run
        self.steps = -(-self.micro // window)
        self.measured: dict[str, float] = {}  # what making the last window's micro-batches has shown
        self.samples: list[dict[str, Any]] = []  # and completions to read
        self.rewards = False  # whether `rewarded` is what an evaluation measures
        if policy.exact:
            self.layout = self.laid_out()
            policy.kernels.attended.clear()

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Rows of each micro-batch of an epoch."""
        if epoch not in self.plans:
            s = self.settings
            self.plans = {epoch: self.cut(self.rows, seed=s.seed, epoch=epoch, shuffle=s.shuffle)}
        return self.plans[epoch]

    def cut(self, rows: data.Dataset, **order: Any) -> list[np.ndarray]:
        """Rows of each micro-batch, in some order."""
        s = self.settings
        return data.plan(rows, batch_size=s.batch_size, batch_tokens=s.batch_tokens, width=self.width, **order)

    def laid_out(self) -> layout.Layout:
        """The shapes of the run where rows lie as on a GPU, chosen from the lengths in its data."""
        epochs = max(1, -(-self.micro // self.per_epoch))
        return layout.of_rows(self.rows, self.plan, epochs, **layout.options(self.policy))

    def needs(self, found: layout.Layout) -> Iterator[layout.Need]:
        """What the parts of the first epoch need, or of as many of its micro-batches as are looked at."""
        for places in layout.spread(self.plan(0)):
            yield from (found.need(part) for part in found.parts([self.rows[int(i)] for i in places]))

    def window(self, step: int) -> Iterator[Micro]:
        """Micro-batches of an optimizer step (from 1); the last step of a run may have fewer."""
        size = self.settings.gradient_accumulation
        places = range((step - 1) * size, min(step * size, self.micro))
        yield from self.together(self.rows, [(place, self.at(place)) for place in places])

    def at(self, place: int) -> np.ndarray:
        """The rows of a micro-batch of the run."""
        epoch, index = divmod(place, self.per_epoch)
        return self.plan(epoch)[index]

    def evaluation(self) -> Iterator[tuple[int, int, Micro]]:
        """(place, how many, micro-batch) over the held-out rows, in the order of their file."""
        assert self.held_out
        plan = self.cut(self.held_out, seed=0, epoch=0, shuffle=False)
        for micro in self.together(self.held_out, list(enumerate(plan))):
            yield micro.place, len(plan), micro

    def together(self, rows: data.Dataset, window: list[tuple[int, np.ndarray]]) -> Iterator[Micro]:
        """Micro-batches, by (place in the run, rows), whose losses are divided by one number."""
        extras: dict[str, mx.array] = {}
        if self.shared:
            extras = self.shared([rows[int(i)] for _, places in window for i in places], self.ratios)
        for place, places in window:
            for micro in self.collate(rows, places, place):
                micro.batch.extras.update(extras)
                yield micro

    @property
    def told(self) -> dict[str, Any]:
        """Metrics of the last window; where rows lie as on a GPU, also how they have lain so far."""
        if self.layout is None:
            return self.measured
        return self.measured | self.layout.shares() | layout.attention(self.policy.kernels.attended)

    def first_epoch(self) -> Iterator[tuple[int, int, Micro]]:
        """The training rows in the batches of the first epoch, without what a window shares."""
        plan = self.plan(0)
        for i, places in enumerate(plan):
            yield from ((i, len(plan), micro) for micro in self.collate(self.rows, places, i))

    def collate(self, rows: data.Dataset, places: np.ndarray, place: int = 0) -> Iterator[Micro]:
        """The micro-batch of these rows, in as many parts as it is computed in."""
        for examples in self.parts([rows[int(i)] for i in places]):
            batch = self.bare(examples)
            if self.reference:
                batch.extras.update(self.reference.extras(examples, batch))
            yield Micro(place, examples, batch)

    def parts(self, examples: list[Example]) -> list[list[Example]]:
        """A micro-batch as it is computed."""
        return self.layout.parts(examples) if self.layout else [examples]

    def ratios(self, examples: list[Example]) -> mx.array:
        """float32 [completions]: log-ratio of each to the reference as the policy is now, no gradient."""
        assert self.reference
        found = []
        size = self.settings.batch_size
        for part in (p for i in range(0, len(examples), size) for p in self.parts(examples[i : i + size])):
            batch = self.bare(part)
            found.append(self.policy.totals(batch) - self.reference.totals(part, batch))
        return mx.concatenate(found)

    def bare(self, examples: list[Example]) -> Batch:
        """The batch of these rows, as data alone makes it."""
        if self.layout:
            return self.layout.lay(examples)
        return data.collate_exact(examples, 0) if self.policy.packing else data.collate(examples, width=self.width)

    def probe(self) -> Sequence[Example] | data.Dataset:
        """Rows with completions at which the KL to the start is measured."""
        return self.held_out or self.rows

    def rewarded(self) -> dict[str, float] | None:
        """What completions of the held-out rows earn, where a verifier judges them; else the loss is evaluated."""
        return None

    @property
    def state(self) -> dict[str, Any]:
        """What a run that goes on must know: plain values. Which rows come next follows from the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Put `state` back."""

    def close(self) -> None:
        """Nothing more is asked."""
        if self.reference:
            self.reference.close()

    def epoch_after(self, step: int) -> float:
        """Passes over the data after an optimizer step."""
        return min(step * self.settings.gradient_accumulation, self.micro) / self.per_epoch


Shared = Callable[[list[Example], Callable[[list[Example]], mx.array]], dict[str, mx.array]] | None
