# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a pass through the model are steered, and how strongly: windows, padding, schedules, gates.

A pass is one call of the model. Our own caches know where each prompt ends. Other callers can say so (`prompt_length`,
`taps.tell`). Where nobody does: a pass without a cache is a whole prompt, and with mlx-lm's caches a pass over several
tokens belongs to the prompt and one over a single token to the completion. (mlx_lm.generate computes a prompt's last
token by itself, so there it counts as generated; speculative decoding computes several at once: say the length there.)
"""

import re
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..taps import Place

FAR = 1 << 29  # a position no text has
NAMED = {"all": None, "prompt": (0, False, 0, True), "generated": (0, True, FAR, False), "last": (-1, True, 0, True)}
HELP = "give the prompt's length: steer(..., prompt_length=n), or generate with mlx_realign"


class Window(NamedTuple):
    """Positions from start to before stop, each counted from the text's start or from the prompt's end."""

    start: int
    start_from_end: bool
    stop: int
    stop_from_end: bool

    @property
    def exact(self) -> bool:
        """Whether it needs to know more of the prompt's end than on which side of it a token is."""
        return (self.start_from_end and self.start != 0) or (self.stop_from_end and self.stop != 0)

    @property
    def reach(self) -> int | None:
        """How many tokens before the prompt's end it tells from those of a longer prompt; None: no token at all."""
        ends = [-at for at, counted in ((self.start, self.start_from_end), (self.stop, self.stop_from_end)) if counted]
        return max(ends, default=None)


def window(text: str) -> Window | None:
    """Of all | prompt | generated | last | start:stop; None for all. UserError for anything else.

    start and stop are positions as in a slice of Python, negative ones counted from the prompt's end, and may be left
    out. As a stop 0 is the prompt's end: -4:0 are the last four tokens of the prompt, -4: these and all after them.
    """
    if text in NAMED:
        named = NAMED[text]
        return None if named is None else Window(*named)
    match = re.fullmatch(r"(-?\d*):(-?\d*)", text.replace(" ", ""))
    if match is None or "-" in match.groups():
        raise UserError(f"positions {text!r}: expected {', '.join(NAMED)}, or start:stop such as 4:20 or -4:0.")
    start, stop = (int(number) if number else None for number in match.groups())
    found = Window(start or 0, (start or 0) < 0, FAR if stop is None else stop, stop is not None and stop <= 0)
    same = found.start_from_end == found.stop_from_end
    if same and found.stop <= found.start:
        raise UserError(f"positions {text!r}: no position is in it.")
    return found


class Pass:
    """One call of the model, as the lowest block that a steering taps sees it; the blocks above share what it found."""

    def __init__(self, place: Place, columns: int, prompt: mx.array | None) -> None:
        """prompt: int32 [1 or B], position of the last prompt token, where the user has given it."""
        self.place, self.columns, cache = place, columns, place.cache
        self.variant = place.variant()
        self.notes = notes_of(cache)
        self.strengths: dict[Any, mx.array] = {}  # of steers, found out at their lowest blocks
        told = place.last_prompt()
        if told is None and prompt is not None and prompt.size > 1 and place.moves:
            raise UserError("steer: mlx-lm's generator moves rows about, so one prompt_length for each has no meaning.")
        if self.variant is not None and self.variant.size > 1 and place.moves:
            raise UserError("steer: mlx-lm's generator moves rows about, so a variant for each has no meaning there.")
        told = prompt if told is None else told
        told = None if place.start is None else told  # nothing to compare it with
        self.told = told is not None
        self.guessed = told is None and cache is not None  # by the number of columns, on a cache of mlx-lm's
        self.prompting = columns > 1 or (isinstance(place.start, int) and place.start == 0)
        self.last = self._guess() if told is None else told  # int32 [1 or B]

    def _guess(self) -> mx.array:
        start, columns = self.place.start, self.columns
        if self.place.cache is None:
            return mx.array([columns - 1])
        if isinstance(start, int):
            end = start + columns if self.prompting else self.notes.get("end", start)
            self.notes["end"] = end
            return mx.array([end - 1])
        return (0 if start is None else start.reshape(-1)) + mx.array([columns - 1 if self.prompting else -1])

    @cached_property
    def positions(self) -> mx.array:
        """int32 [1 or B, T], padding below 0; where the cache does not count tokens, from the pass's own start."""
        if self.place.start is None and self.guessed:
            return mx.arange(self.columns)[None]
        return self.place.positions(self.columns)

    @property
    def padded(self) -> bool:
        """Whether columns of it may be padding."""
        return self.columns > 1 and isinstance(self.place.start, mx.array)

    def inside(self, numbers: mx.array, *, exact: bool, counted: bool) -> mx.array:
        """bool [1 or B, T]: which tokens are in the windows int32 [1 or B, 4] of `Window`, by row; no padding is.

        exact: some of them are (`Window.exact`); counted: some count from the start of the text.
        """
        if counted:
            self.place.positions(1)  # its UserError, where tokens are not counted
        if exact and self.guessed:
            raise UserError(f"steer: where the prompt ends is not known with this cache: {HELP}.")
        end = (self.last + 1)[:, None]
        start, start_from_end, stop, stop_from_end = (numbers[:, i : i + 1] for i in range(4))
        first = mx.maximum(start + start_from_end * end, 0)
        return (self.positions >= first) & (self.positions < stop + stop_from_end * end)

    def index(self) -> mx.array:
        """int32 [1 or B, T]: index of each generated token, below 0 in the prompt."""
        if self.guessed and not isinstance(self.place.start, int):
            raise UserError(f"steer: a schedule counts generated tokens, which this cache does not tell apart: {HELP}.")
        return self.positions - self.last[:, None] - 1


def numbers(found: Window | None) -> np.ndarray:
    """int32 [4] of a window."""
    return np.array(found or Window(0, False, FAR, False), np.int32)


def notes_of(cache: Any) -> dict[str, Any]:
    """What taps keep with a cache from pass to pass; our own hand it on as rows come and go."""
    if cache is None:
        return {}
    if not hasattr(cache, "notes"):
        cache.notes = {}
    return cache.notes
