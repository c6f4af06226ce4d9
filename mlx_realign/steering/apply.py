# SPDX-License-Identifier: Apache-2.0
"""Steering put on a model: taps behind its blocks, and the numbers they read.

    with steer(policy, direction, coefficient=2.0) as steering:
        ...
        steering.set(coefficient=3.0)

Rows of one batch may have configurations of their own (`rows`; a row's is its `variant`). Steers that differ in numbers
only are one operation for the whole batch: it takes each row's numbers out of a table. All numbers live in a holder,
so that a new coefficient, angle, threshold or vector never costs a compiled step a new trace.
"""

import dataclasses
import itertools
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import taps, vectors
from ..errors import UserError
from ..policy import Policy
from ..taps import Place
from ..vectors import Direction
from . import condition, operators, schedule, where
from .spec import Steer
from .where import Pass

_serials = itertools.count()

Given = Steer | Direction | str | Path  # a path: the file of a direction


def steer(
    model: Policy | nn.Module,
    *steers: Given,
    rows: Sequence[Sequence[Given]] | None = None,
    prompt_length: int | Sequence[int] | None = None,
    **changes: Any,
) -> "Steering":
    """Steer a model until the context ends, or until `remove`.

    steers: for all rows, applied in this order; a direction, or the path of its file, is used as the file means it to
    be (`Steer.of`). rows: for rows of variant i, after those, rows[i]; rows come with a variant in
    `rollout(..., variants=)` and within `taps.tell(variant=)`, others have 0. changes: fields of Steer, for all that
    are given. prompt_length: tokens of each row's prompt, where neither our caches nor `taps.tell` know them and
    positions or a condition ask for them. Raises UserError for what does not fit the model, or one another.
    """

    def made(given: Given) -> Steer:
        return Steer.of(_loaded(given, model) if isinstance(given, str | Path) else given, **changes)

    common = [made(one) for one in steers]
    more = [[made(one) for one in row] for row in rows] if rows is not None else [[]]
    if rows is not None and not more:
        raise UserError("steer: rows is empty. Give a list of directions for each configuration, or leave rows out.")
    if not any([*common, *row] for row in more):
        raise UserError("steer: no direction is given.")
    return Steering(
        model.model if isinstance(model, Policy) else model, [[*common, *row] for row in more], prompt_length
    )


def _loaded(file: str | Path, model: Policy | nn.Module) -> Direction:
    """UserError where it is for another model, as far as this one is known: a policy knows its weights."""
    return vectors.load(file, policy=model if isinstance(model, Policy) else None)


class Slot:
    """Steers of one kind, at most one of each configuration."""

    def __init__(self, name: str, kind: tuple[Any, ...], configurations: int) -> None:
        self.name, self.kind = name, kind
        self.operator, self.windowed, self.exact, self.counted, self.scheduled, self.conditioned = kind
        self.plain = self.operator == "add" and not (self.windowed or self.scheduled or self.conditioned)
        self.steers: list[Steer | None] = [None] * configurations

    @property
    def blocks(self) -> list[int]:
        """Where one of its steers acts."""
        return sorted({block for one in self.steers if one for block in one.at})

    @property
    def condition(self) -> condition.Condition:
        """One of its conditions: all are of one kind."""
        return next(one.condition for one in self.steers if one and one.condition)

    def arrays(self, on: bool, dtype: mx.Dtype) -> dict[str, mx.array]:
        """What its taps read, a row per configuration: zeros for those that have no steer here."""
        strength = np.array([one.coefficient if one and on else 0.0 for one in self.steers], np.float32)[:, None, None]
        found = {} if self.plain else {"coefficient": mx.array(strength)}
        for block in self.blocks:
            rows = [one.numbers(block) if one and block in one.at else None for one in self.steers]
            here = np.array([row is not None for row in rows], np.float32)[:, None, None]
            parts = self._table(rows)
            if self.plain:
                added = strength * here * parts["vector"]
                added = np.where(added == 0, np.float32(-0.0), added)  # x + -0.0 is x, whatever its sign
                found[f"{block}_added"] = mx.array(added).astype(dtype)
            else:
                found[f"{block}_here"] = mx.array(here)
                found |= {f"{block}_{name}": mx.array(part) for name, part in parts.items()}
        if self.windowed:
            found["window"] = mx.array(np.stack([_window(one) for one in self.steers]))
        if self.scheduled:
            found["schedule"] = mx.array(np.stack([_schedule(one) for one in self.steers]))
        if self.conditioned:
            parts = self._table([one.condition.numbers() if one and one.condition else None for one in self.steers])
            found |= {f"if_{name}": mx.array(part) for name, part in parts.items()}
        mx.eval(found)  # by this thread: others may read them
        return found

    def _table(self, rows: list[dict[str, np.ndarray] | None]) -> dict[str, np.ndarray]:
        """By name, one row per configuration; those without numbers get some that are as good as any."""
        some = next(row for row in rows if row is not None)
        return {name: np.stack([(row or some)[name] for row in rows]) for name in some}


class Steering:
    """What `steer` has put on a model. `set`, `off` and `on` change numbers only; `remove` leaves no trace."""

    def __init__(
        self, model: nn.Module, configurations: list[list[Steer]], prompt_length: int | Sequence[int] | None
    ) -> None:
        self.model, self.key, self.active = model, f"steer{next(_serials)}", True
        self.count = len(configurations)
        self.slots = _packed(configurations)
        tensors: list[mx.array] = [value for _, value in tree_flatten(model.parameters())]  # pyright: ignore
        self.dtype = next(x.dtype for x in tensors if mx.issubdtype(x.dtype, mx.floating))
        paths = taps.blocks(model)
        self.blocks = sorted({block for slot in self.slots for block in self._tapped(slot)})
        if beyond := [block for block in self.blocks if not -1 <= block < len(paths)]:
            raise UserError(f"steer: the model has the blocks 0 to {len(paths) - 1}, no block {beyond[0]}.")
        arrays = {f"{slot.name}_{k}": v for slot in self.slots for k, v in self._arrays(slot).items()}
        if prompt_length is not None:
            lengths = np.atleast_1d(np.array(prompt_length, np.int32))
            arrays["prompt"] = mx.array(lengths - 1)
        self.holder = taps.hold(model, arrays | {"form": self._form()}, self.count, self._reach())
        self._now = threading.local()
        self.handles = [
            taps.put(model, paths[max(block, 0)], self._tap(block), before=block < 0) for block in self.blocks
        ]

    def __enter__(self) -> "Steering":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take it off the model, in any order with other taps; twice does nothing."""
        for handle in self.handles:
            handle.remove()
        taps.release(self.model, self.holder)

    def set(self, index: int = 0, row: int | None = None, **changes: Any) -> None:
        """Change fields of the index-th Steer of configuration `row` (None: all), and its condition's threshold.

        What it is made of must stay: the operator, the blocks, whether it has a window, a schedule, a condition, and
        the condition's block. UserError otherwise.
        """
        touched = []
        for i in range(self.count) if row is None else [row]:
            slot = self._slot(i, index)
            old = slot.steers[i]
            assert old is not None
            new = _changed(old, dict(changes))
            if new.kind != slot.kind or set(new.at) != set(old.at):
                raise UserError(
                    f"steer: {', '.join(changes)} cannot be set while the steering is on: that would be another "
                    "operation. Take it off and steer anew."
                )
            touched.append((slot, i, new))
        for slot, i, new in touched:
            slot.steers[i] = new
        for slot in {id(slot): slot for slot, _, _ in touched}.values():
            self._write(slot)
        self.holder.reach = self._reach()

    def off(self) -> None:
        """All coefficients 0: the base model, bit for bit, in the same trace."""
        self._switch(False)

    def on(self) -> None:
        """Back to their values."""
        self._switch(True)

    def _switch(self, on: bool) -> None:
        self.active = on
        for slot in self.slots:
            self._write(slot)

    def _write(self, slot: Slot) -> None:
        for name, array in self._arrays(slot).items():
            self.holder[f"{slot.name}_{name}"] = array

    def _arrays(self, slot: Slot) -> dict[str, mx.array]:
        return slot.arrays(self.active, self.dtype)

    def _slot(self, row: int, index: int) -> Slot:
        """Where the index-th steer of a configuration is."""
        if not 0 <= row < self.count:
            raise UserError(f"steer: no configuration {row}; there are {self.count}, from 0.")
        mine = [slot for slot in self.slots if slot.steers[row]]
        if not 0 <= index < len(mine):
            raise UserError(f"steer: configuration {row} has {len(mine)} steers, no steer {index}.")
        return mine[index]

    def _tapped(self, slot: Slot) -> list[int]:
        return [*slot.blocks, *([slot.condition.block] if slot.conditioned else [])]

    def _reach(self) -> int | None:
        """Of all its steers, as `taps.reach` has it."""
        found = [one.reach for slot in self.slots for one in slot.steers if one and one.reach is not None]
        return max(found, default=None)

    def _form(self) -> mx.array:
        """An empty array whose shape tells one set of operations from another, and so a compiled step of one from
        that of another with as many numbers."""
        text = repr([(slot.kind, slot.blocks) for slot in self.slots])
        return mx.zeros((0, zlib.crc32(text.encode()) % 2**30))

    # ------------------------------------------------------------------ in the graph

    def _tap(self, block: int) -> taps.Tap:
        reading = [slot for slot in self.slots if slot.conditioned and slot.condition.block == block]
        acting = [slot for slot in self.slots if block in slot.blocks]

        def tap(h: mx.array, place: Place) -> mx.array:
            if block == self.blocks[0]:
                self._now.value = self._begin(h, place)
            now: Pass = self._now.value
            for slot in reading:
                parts = ("unit", "offset", "threshold", "sign")
                numbers = {name: self._take(slot, f"if_{name}", now) for name in parts}
                condition.read(slot.condition, numbers, h, now, self._gate(slot))
            for slot in acting:
                h = self._plain(slot, block, h, now) if slot.plain else self._apply(slot, block, h, now)
            return h

        return tap if block == self.blocks[0] else taps.anywhere(tap)

    def _begin(self, h: mx.array, place: Place) -> Pass:
        if h.ndim != 3:
            raise UserError(f"steer: blocks of this model give {h.ndim} dimensions: it has several residual streams.")
        for wide in {one.direction.width for slot in self.slots for one in slot.steers if one} - {h.shape[-1]}:
            raise UserError(f"steer: the direction is {wide} wide and the model {h.shape[-1]}: it is another model's.")
        now = Pass(place, h.shape[1], self.holder["prompt"] if "prompt" in self.holder else None)
        if self.count > 1 and now.variant is not None:
            now.variant = mx.clip(now.variant, 0, self.count - 1)  # beyond it lies other memory
        return now

    def _take(self, slot: Slot, name: str, now: Pass) -> mx.array:
        """Numbers of each row, [1 or B, ...]."""
        table = self.holder[f"{slot.name}_{name}"]
        if self.count == 1:
            return table
        return table[:1] if now.variant is None else table[now.variant]

    def _plain(self, slot: Slot, block: int, h: mx.array, now: Pass) -> mx.array:
        steered = h + self._take(slot, f"{block}_added", now).astype(h.dtype)
        return mx.where((now.positions >= 0)[..., None], steered, h) if now.padded else steered

    def _apply(self, slot: Slot, block: int, h: mx.array, now: Pass) -> mx.array:
        strength = self._strength(slot, block, now)
        if self.count > 1:
            strength = strength * self._take(slot, f"{block}_here", now)
        parts = operators.parts(slot.operator)
        numbers = {name: self._take(slot, f"{block}_{name}", now) for name in parts}
        return operators.find(slot.operator)(h, strength, **numbers)

    def _strength(self, slot: Slot, block: int, now: Pass) -> mx.array:
        """float32 [1 or B, 1 or T, 1]: the coefficient of each token, the same at all blocks but for a gate's."""
        known = slot.name, slot.conditioned is not None and block < slot.condition.block
        if known not in now.strengths:
            now.strengths[known] = self._fresh_strength(slot, block, now)
        return now.strengths[known]

    def _fresh_strength(self, slot: Slot, block: int, now: Pass) -> mx.array:
        found = self._take(slot, "coefficient", now)
        if slot.windowed:
            inside = now.inside(self._take(slot, "window", now), exact=slot.exact, counted=slot.counted)
            found = found * inside[..., None]
        elif now.padded:
            found = found * (now.positions >= 0)[..., None]
        if slot.scheduled:
            found = found * schedule.factor(now.index(), self._take(slot, "schedule", now))[..., None]
        if slot.conditioned:
            found = found * condition.gate(slot.condition, now, block, self._gate(slot))[..., None]
        return found

    def _gate(self, slot: Slot) -> str:
        return f"{self.key}_{slot.name}"


def _packed(configurations: list[list[Steer]]) -> list[Slot]:
    """Slots that hold every configuration's steers in their order."""
    slots: list[Slot] = []
    for i, steers in enumerate(configurations):
        first = 0
        for one in steers:
            free = (j for j in range(first, len(slots)) if slots[j].kind == one.kind)
            at = next(free, len(slots))
            if at == len(slots):
                slots.append(Slot(f"s{at}", one.kind, len(configurations)))
            slots[at].steers[i] = one
            first = at + 1
    return slots


def _changed(old: Steer, changes: dict[str, Any]) -> Steer:
    if "threshold" in changes:
        threshold = changes.pop("threshold")
        if old.condition is None:
            raise UserError("steer: there is no condition whose threshold could be set.")
        changes["condition"] = dataclasses.replace(old.condition, threshold=threshold)
    return Steer.of(old, **changes)


def _window(one: Steer | None) -> np.ndarray:
    return where.numbers(where.window(one.positions) if one else None)


def _schedule(one: Steer | None) -> np.ndarray:
    return (one.schedule if one else schedule.CONSTANT).numbers()
