# SPDX-License-Identifier: Apache-2.0
"""A model's decoder blocks side by side, each fed with states of its own, its layers made to give what one likes."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import noise, taps
from .adapter import adapters_of
from .adapter_layers import LINEAR, SWITCH, Base, base_of, matrix_shape
from .adapter_targets import adaptable
from .errors import UserError
from .policy import Policy

Said = mx.array | Callable[[mx.array], mx.array]  # what a layer is made to give: a vector [d], or a function of its own

TOKENS = 12
STATE_SIZE = 0.1  # root mean square of the states that blocks read: far above a norm's epsilon, far below a gain


class Bench:
    """All decoder blocks side by side: each reads random states of its own, and layers can be told what to give."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.model = policy, policy.model
        self.blocks = taps.blocks(self.model)
        self.stack = ExitStack()
        self.given: Mapping[str, Said] = {}
        self.heard: dict[str, mx.array] = {}  # what layers would give, by path, in the order of their calls
        self.out: dict[int, mx.array] = {}
        keys = mx.random.split(mx.random.key(0), 3)
        self.tokens = mx.random.randint(0, policy.vocabulary, (1, TOKENS), key=keys[0])
        self.states = mx.zeros(0)
        for i, path in enumerate(self.blocks):
            self._tap(path, lambda x, _, i=i: self._feed(x, i), before=True)
            self._tap(path, lambda x, _, i=i: self._catch(x, i))
        self.policy.body.hidden(self.tokens)
        first = self.out[0]
        self.width = first.shape[-1]
        if first.shape != (1, TOKENS, self.width):
            self.stack.close()
            raise UserError(
                f"--model {policy.name}: its blocks pass on an array {first.shape}, not one vector per token: what "
                "writes to such a stream cannot be told."
            )
        self.states = STATE_SIZE * mx.random.normal((len(self.blocks), TOKENS, self.width), key=keys[1])
        self.states = self.states.astype(first.dtype).astype(mx.float32)
        self.tolerance = 5e-3 if noise.judged_as(first.dtype) == mx.float32 else 5e-2
        self.zero = mx.zeros(self.width)
        half = self.width // 2
        signs = mx.concatenate([mx.ones(half), -mx.ones(self.width - half)])
        self.signs = [signs[mx.random.permutation(self.width, key=key)] for key in mx.random.split(keys[2])]
        self.layers = _candidates(self.model, self.width)
        self.block_of = {p: i for p in self.layers for i, b in enumerate(self.blocks) if p.startswith(b + ".")}
        for path in self.block_of:
            self._tap(path, lambda y, _, path=path: self._say(y, path))
        self.silent: dict[str, Said] = dict.fromkeys(self.block_of, self.zero)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def run(self, given: Mapping[str, Said]) -> np.ndarray:
        """What the blocks give, float32 [blocks, T, d], while the layers in `given` give what it says."""
        self.given = given
        self.heard.clear()
        self.policy.body.hidden(self.tokens)
        return np.array(mx.stack([self.out[i].astype(mx.float32).reshape(TOKENS, -1) for i in range(len(self.blocks))]))

    @property
    def called(self) -> list[str]:
        """Layers in the order of their calls in the last run."""
        return list(self.heard)

    @property
    def experts(self) -> set[str]:
        """Layers that see the tokens routed to them only: all experts in one, or one module for each.

        One may be given every token; then another of its block is given none.
        """
        apart = {path for path, y in self.heard.items() if y.size != TOKENS * self.width}
        families = {_family(path) for path in apart}
        inside = {p for p, b in self.block_of.items() if re.search(r"\.\d+\.", p.removeprefix(self.blocks[b]))}
        idle, busy = ({_family(p) for p in inside if (p in self.heard) is called} for called in (False, True))
        families |= idle & busy
        return {path for path in self.block_of if path in apart or _family(path) in families}

    def groups(self, block: int) -> list[tuple[str, ...]]:
        """Layers of a block in the order of their calls; experts of one family, called or not, are one."""
        found: dict[str, list[str]] = {}
        for path in [*self.called, *sorted(self.experts - set(self.called))]:
            if self.block_of[path] == block:
                found.setdefault(_family(path) if path in self.experts else path, []).append(path)
        return [tuple(paths) for paths in found.values()]

    def _tap(self, path: str, tap: taps.Tap, before: bool = False) -> None:
        self.stack.callback(taps.put(self.model, path, tap, before=before).remove)

    def _feed(self, x: mx.array, block: int) -> mx.array:
        return mx.broadcast_to(self.states[block], x.shape).astype(x.dtype) if self.states.size else x

    def _catch(self, x: mx.array, block: int) -> mx.array:
        self.out[block] = x
        return x

    def _say(self, y: mx.array, path: str) -> mx.array:
        self.heard[path], said = y, self.given.get(path)
        if isinstance(said, mx.array):
            return mx.broadcast_to(said, y.shape).astype(y.dtype)
        return said(y) if said else y


def _family(path: str) -> str:
    """The path without the last of its indices: that of an expert among experts."""
    parts = path.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:last], "*", *parts[last + 1 :]])


def _candidates(model: nn.Module, width: int) -> dict[str, Base]:
    """Path -> layer (the base of an adapted one) of all linear and expert layers with `width` outputs."""
    adapted = adapters_of(model)
    inside = tuple(path + "." for path in adapted)
    layers = {path: layer for path, layer in adaptable(model).items() if not (inside and path.startswith(inside))}
    layers |= {path: base_of(layer) for path, layer in adapted.items()}
    return {p: layer for p, layer in layers.items() if isinstance(layer, LINEAR + SWITCH) and outputs(layer) == width}


def outputs(layer: Base) -> int:
    """Number of entries that a linear layer, or each expert, gives."""
    return layer.output_dims if isinstance(layer, SWITCH) else matrix_shape(layer)[0]
