# SPDX-License-Identifier: Apache-2.0
"""How strongly each writer loses the direction: a tent over the blocks for attention and one for MLPs.

The shape and the ranges that a search draws from are those of Heretic (Weidmann 2025), but for the edit itself: a
weight w takes exactly w of the direction out of what a writer gives. And but for the strength that both tents are
multiplied by, since half of a good kernel is often better than a whole one of another shape: eleven numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from ..errors import UserError
from ..vectors import Direction
from ..writers import Writer
from .edit import Edit

Component = Literal["attention", "mlp"]
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")
WEIGHTS = {"attention": (0.8, 1.5), "mlp": (-0.25, 1.5)}  # the highest of a tent; below 0 counts as 0
POSITION = (0.6, 1.0)  # of a tent's top, as a share of the last block
REACH = 0.6  # a tent's longest distance, as a share of the last block
SOURCE = (0.4, 0.9)  # where a direction for all blocks is taken from, as a share of the last block
STRENGTH = (0.1, 1.0)  # what both tents are times
SPACE = (WEIGHTS, POSITION, REACH, SOURCE, STRENGTH)


class Suggests(Protocol):
    """What draws numbers: an Optuna trial, or anything with these two."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Tent(NamedTuple):
    """Weight by block: falls off evenly on both sides of its top, and is 0 further away than `distance`."""

    max_weight: float
    position: float  # of the top, in blocks; it may lie between two
    min_weight: float  # at `distance` blocks from the top
    distance: float

    def weight(self, block: int) -> float:
        """Of a 0-based block."""
        away = abs(block - self.position)
        if away > self.distance:
            return 0.0
        share = away / self.distance if self.distance else 0.0
        return self.max_weight + (self.min_weight - self.max_weight) * share


@dataclass(frozen=True)
class Kernel:
    """A tent for each component, and whose direction is removed."""

    tents: Mapping[str, Tent]  # "attention" and "mlp"; a component that is not there keeps what it writes
    source: float | None = None  # the block whose direction all lose, also between two; None: each block its own

    def weight(self, component: str, block: int) -> float:
        """How much of the direction a writer of this component loses: 0 nothing, 1 all of it."""
        return self.tents[component].weight(block) if component in self.tents else 0.0

    def edits(self, writers: Sequence[Writer], direction: Direction) -> list[Edit]:
        """One edit per writer whose weight is not 0."""
        found = []
        for writer in writers:
            if weight := self.weight(component(writer), writer.block):
                r = direction.unit(writer.block) if self.source is None else direction.at(self.source)
                found.append(Edit(writer, writer.basis(r), weight))
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON: {"source": ..., "attention": {...}, "mlp": {...}}."""
        return {"source": self.source, **{name: tent._asdict() for name, tent in self.tents.items()}}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Kernel":
        """What `plain` gave."""
        tents = {name: Tent(**tent) for name, tent in values.items() if name != "source"}
        return cls(tents, values["source"])


class Space(NamedTuple):
    """What kernels a search draws."""

    components: Sequence[Component]
    last: int  # the last block, 0-based
    sources: tuple[float, float] | None  # where a direction for all blocks may lie; None: it has vectors too far apart
    per_block: bool  # whether every writer's block has a vector of its own

    def draw(self, trial: Suggests) -> Kernel:
        """One kernel; the same names and ranges each time, as a multivariate sampler needs them."""
        ways = [*(["one"] if self.sources else []), *(["each"] if self.per_block else [])]
        way = trial.suggest_categorical("direction", ways)
        source = trial.suggest_float("source", *self.sources) if self.sources else None
        strength = trial.suggest_float("strength", *STRENGTH)
        tents = {name: self._tent(trial, name, strength) for name in self.components}
        return Kernel(tents, source if way == "one" else None)

    def middle(self) -> dict[str, Any]:
        """What `draw` asks for, in the middle of its range; each block its own direction, where it can be."""
        asked = _Middle({})
        self.draw(asked)
        return asked.params

    def _tent(self, trial: Suggests, name: Component, strength: float) -> Tent:
        most = strength * max(0.0, trial.suggest_float(f"{name}.max_weight", *WEIGHTS[name]))
        position = trial.suggest_float(f"{name}.position", POSITION[0] * self.last, POSITION[1] * self.last)
        least = most * trial.suggest_float(f"{name}.min_share", 0.0, 1.0)
        distance = trial.suggest_float(f"{name}.distance", 1.0, max(1.0, REACH * self.last))
        return Tent(most, position, least, distance)


class _Middle(NamedTuple):
    """Gives the middle of what is asked for, and keeps it."""

    params: dict[str, Any]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        return self.params.setdefault(name, (low + high) / 2)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.params.setdefault(name, choices[-1])


def space_of(writers: Sequence[Writer], direction: Direction, blocks: int) -> Space:
    """What can be drawn for these writers, this direction and a model of so many blocks.

    UserError where the direction has no vector for any block of the model.
    """
    there = {block for block in direction.blocks if 0 <= block < blocks}
    if not there:
        raise UserError(f"the direction has vectors for blocks {direction.blocks}, the model has 0 to {blocks - 1}.")
    last = blocks - 1
    per_block = {writer.block for writer in writers} <= there
    low, high = max(SOURCE[0] * last, min(there)), min(SOURCE[1] * last, max(there))
    if low <= high and set(range(math.floor(low), math.ceil(high) + 1)) <= there:
        sources = (low, high)
    else:
        sources = None if per_block else (float(max(there)), float(max(there)))
    written = {component(writer) for writer in writers}
    components: list[Component] = [name for name in COMPONENTS if name in written]
    return Space(components, last, sources, per_block)


def component(writer: Writer) -> Component:
    """Which of the two tents a writer's weight comes from; experts are MLPs."""
    return "attention" if writer.kind == "attention" else "mlp"
