# SPDX-License-Identifier: Apache-2.0
"""The micro-batches of a run, in an order that depends on the seed alone: a run that goes on sees the same ones."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import data
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
    ) -> None:
        self.reference, self.settings, self.rows, self.held_out = reference, settings, rows, held_out
        self.width = policy.width if policy.compiled else (lambda n: n)
        self.plans: dict[int, list[np.ndarray]] = {}
        self.per_epoch = len(self.plan(0))
        window = settings.gradient_accumulation
        epochs = max(1, round(settings.epochs * self.per_epoch))
        self.micro = settings.steps * window if settings.steps else epochs  # micro-batches of the whole run
        self.steps = -(-self.micro // window)

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

    def window(self, step: int) -> Iterator[Micro]:
        """Micro-batches of an optimizer step (from 1); the last step of a run may have fewer."""
        size = self.settings.gradient_accumulation
        for place in range((step - 1) * size, min(step * size, self.micro)):
            epoch, index = divmod(place, self.per_epoch)
            yield self.collate(self.rows, self.plan(epoch)[index], place)

    def evaluation(self) -> Iterator[tuple[int, int, Micro]]:
        """(place, how many, micro-batch) over the held-out rows, in the order of their file."""
        assert self.held_out
        plan = self.cut(self.held_out, seed=0, epoch=0, shuffle=False)
        for i, places in enumerate(plan):
            yield i, len(plan), self.collate(self.held_out, places)

    def first_epoch(self) -> Iterator[tuple[int, int, Micro]]:
        """The same of the training rows, in the batches of the first epoch."""
        plan = self.plan(0)
        for i, places in enumerate(plan):
            yield i, len(plan), self.collate(self.rows, places, i)

    def collate(self, rows: data.Dataset, places: np.ndarray, place: int = 0) -> Micro:
        """The micro-batch of these rows."""
        examples = [rows[int(i)] for i in places]
        batch = self.bare(examples)
        if self.reference:
            batch.extras["ref_logps"] = self.reference.totals(examples, batch)
        return Micro(place, examples, batch)

    def bare(self, examples: list[Example]) -> Batch:
        """The batch of these rows, as data alone makes it."""
        return data.collate(examples, width=self.width)

    def epoch_after(self, step: int) -> float:
        """Passes over the data after an optimizer step."""
        return min(step * self.settings.gradient_accumulation, self.micro) / self.per_epoch
