# SPDX-License-Identifier: Apache-2.0
"""Caches by mlx-lm's protocol (`offset`, `update_and_fetch`, `make_mask`) through which completions share a prompt.

Recorders stand in the layers while prompts are computed and keep what they give, graph and all; readers hand it to
each completion of a prompt. Attention keeps keys and values, a recurrence its state after the prompt's last token.
Prompts without padding need no mask: mlx's "causal" is aligned at the last key, so that a completion sees its prompt
and its own past, and attention has a backward pass without a quadratic array.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from .batch import Pack
from .kernels import Band

Mask = mx.array | str | None


class PromptRecorder:
    """Of one layer's attention while the prompts are computed: keeps keys and values as they come."""

    variant: mx.array | None = None  # int32 [P]: the configuration of each row that taps ask for
    last_prompt: mx.array | None = None  # int32 [P]: position of each prompt's last token, which comes after these

    def __init__(self, pad: mx.array | None, window: int | None) -> None:
        """pad: int32 [P], columns of padding before each prompt; None: there are none."""
        self.pad, self.window = pad, window
        self.offset: mx.array | int = 0 if pad is None else -pad
        self.kv: tuple[mx.array, ...] = ()
        self.notes: dict[str, mx.array] = {}  # [P, ...]: what taps keep of each prompt, handed on to its rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.kv = (keys, values)
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return _mask(0, n, self.pad, window_size or self.window, return_array)


class PromptReader:
    """Of one layer's attention while completions are computed: keys and values = [those of the row's prompt, own]."""

    variant: mx.array | None  # int32 [r]
    last_prompt: mx.array | None  # int32 [1 or r]
    notes: dict[str, mx.array]  # [r, ...]

    def __init__(self, recorder: PromptRecorder, rows: mx.array) -> None:
        self.kv = tuple(x[rows] for x in recorder.kv)
        self.prefix = recorder.kv[0].shape[2]
        self.pad, self.window = None if recorder.pad is None else recorder.pad[rows], recorder.window
        self.offset: mx.array | int = self.prefix if self.pad is None else self.prefix - self.pad
        _hand_on(recorder, self, rows)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.kv[0], keys], 2), mx.concatenate([self.kv[1], values], 2)

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return _mask(self.prefix, n, self.pad, window_size or self.window, return_array)


class PackedRows(PromptRecorder):
    """Of one layer's attention while packed rows are computed; attention (`kernels`) asks it to take them apart."""

    def __init__(self, pack: Pack, window: int | None) -> None:
        super().__init__(None, window)
        self.pack = pack

    def apart(self, x: mx.array) -> mx.array:
        """[R, H, Lc, D] of x [K, H, W, D]."""
        rows, columns = self.pack.documents.shape
        flat = moved(x.swapaxes(1, 2).reshape(-1, x.shape[1] * x.shape[3]), self.pack.documents, self.pack.back)
        return flat.reshape(rows, columns, x.shape[1], x.shape[3]).swapaxes(1, 2)

    def together(self, x: mx.array) -> mx.array:
        """[K, H, W, D] of x [R, H, Lc, D]."""
        rows, columns = self.pack.tokens.shape
        flat = moved(x.swapaxes(1, 2).reshape(-1, x.shape[1] * x.shape[3]), self.pack.back, self.pack.documents)
        return flat.reshape(rows, columns, x.shape[1], x.shape[3]).swapaxes(1, 2)


def moved(x: mx.array, to: mx.array, back: mx.array) -> mx.array:
    """[m, D]: row to[i] of x [n, D], zeros where that is n. back: the inverse, so that the gradient is no scatter."""

    @mx.custom_function
    def move(x: mx.array) -> mx.array:
        return mx.pad(x, [(0, 1), (0, 0)])[to.reshape(-1)]

    @move.vjp
    def gradient(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return mx.pad(cotangent, [(0, 1), (0, 0)])[back.reshape(-1)]

    found: Any = move(x)
    return found


class StateRecorder(ArraysCache):
    """Of one recurrence while prompts without padding are computed: keeps the states that it ends with."""

    variant: mx.array | None = None
    last_prompt: mx.array | None = None

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.offset = 0
        self.notes: dict[str, mx.array] = {}

    @property
    def kv(self) -> tuple[mx.array, ...]:
        """The arrays of its state, by the name that keys and values have."""
        return tuple(x for x in self.cache if x is not None)

    @kv.setter
    def kv(self, arrays: Sequence[mx.array]) -> None:
        self.cache: list[mx.array | None] = [*arrays] or [None] * len(self.cache)


class StateReader(StateRecorder):
    """Of one recurrence while completions are computed: begins with the states of each row's prompt."""

    def __init__(self, recorder: StateRecorder, rows: mx.array, prefix: int) -> None:
        super().__init__(len(recorder.cache))
        self.cache = [x[rows] for x in recorder.kv]
        self.offset = prefix
        _hand_on(recorder, self, rows)


Recorder = PromptRecorder | StateRecorder
Reader = PromptReader | StateReader


def record(
    model: nn.Module, pad: mx.array | None, width: int, variant: mx.array | None = None, lead: mx.array | None = None
) -> list[Any]:
    """Recorders for prompts without their last tokens: `width` columns, of which pad int32 [P] are empty.

    lead: int32 [P], how many further tokens of each prompt come behind them in the rows, its last one not counted.
    """
    last = mx.array([width]) if pad is None else width - pad

    def make(entry: Any) -> Any:
        if isinstance(entry, CacheList):
            return CacheList(*map(make, entry.caches))
        stateful = isinstance(entry, ArraysCache)
        recorder = StateRecorder(len(entry.cache)) if stateful else PromptRecorder(pad, window_of(entry))
        recorder.last_prompt, recorder.variant = last if lead is None else last + lead, variant
        return recorder

    return [make(entry) for entry in make_prompt_cache(model)]


def read(recorders: Sequence[Any], rows: mx.array, width: int) -> list[Any]:
    """Readers for completions of what was recorded of `width` columns; rows: int32 [r], the prompt of each."""

    def make(one: Any) -> Any:
        if isinstance(one, CacheList):
            return CacheList(*map(make, one.caches))
        return PromptReader(one, rows) if isinstance(one, PromptRecorder) else StateReader(one, rows, width)

    return [make(one) for one in recorders]


def window_of(entry: Any) -> int | None:
    """How many tokens the attention of a cache of mlx-lm's looks back; None without a limit."""
    return getattr(entry, "max_size", None)


def _hand_on(recorder: Recorder, reader: Reader, rows: mx.array) -> None:
    last = recorder.last_prompt
    reader.last_prompt = last if last is None or last.size == 1 else last[rows]
    reader.variant = None if recorder.variant is None else recorder.variant[rows]
    reader.notes = {name: x[rows] for name, x in recorder.notes.items()}


def _mask(start: int, n: int, pad: mx.array | None, window: int | None, array: bool) -> Mask:
    """Nothing, "causal" or a band where that says all; else bool [n, start + n], with padding [rows, 1, n, start + n].

    True = may look: causal, no pad column, within the window. Pad queries look at themselves, so that no row of the
    softmax is empty.
    """
    if pad is None and not array and (n > 1 or window is None or start + n <= window):
        short = window is not None and start + n > window
        return Band(window) if short else "causal" if n > 1 else None  # pyright: ignore[reportArgumentType]
    query, key = mx.arange(start, start + n)[:, None], mx.arange(start + n)[None]
    seen = query >= key
    if window is not None:
        seen = seen & (query - key < window)
    if pad is None:
        return seen
    return (seen & (pad[:, None, None, None] <= key)) | (query == key)
