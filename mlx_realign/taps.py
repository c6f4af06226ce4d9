# SPDX-License-Identifier: Apache-2.0
"""Functions behind the modules of a model: they see what a decoder block or a layer in it gives, and may change it.

A module's class is swapped for a subclass, so parameter paths stay and taking a tap off restores the model exactly, in
any order. A tap that computes with numbers of its own reads them from a holder (`hold`) whenever it is called: holders
are part of `model.state`, so a compiled step sees a change without a new trace.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .adapter_targets import blocks_of
from .errors import UserError

HELD = "_held"  # key of the model under which holders live; the underscore keeps them out of its parameters


class Place(NamedTuple):
    """Where in a text a decoder block is being computed."""

    cache: Any  # the block's, or None
    start: Any  # position of the first column: int, or int32 [B]; None where the cache does not say
    told: dict[str, Any]  # by whoever runs the model without a cache of ours; see `tell`

    def positions(self, columns: int) -> mx.array:
        """int32 [1 or B, columns]: place of each column in its text, the first token at 0; padding is below 0."""
        if self.start is None:
            kind = type(self.cache).__name__
            raise UserError(f"positions cannot be known in this model: its cache ({kind}) counts no tokens; use `all`")
        start = mx.array(self.start, mx.int32).reshape(-1, 1)
        return start + mx.arange(columns, dtype=mx.int32)[None]

    def last_prompt(self) -> mx.array | None:
        """int32 [1 or B]: position of the last prompt token of each row; None where nobody knows."""
        known = getattr(self.cache, "last_prompt", None)
        return self.told.get("last_prompt") if known is None else known

    @property
    def moves(self) -> bool:
        """Whether rows of its cache come and go without a word to us: a batched one of mlx-lm's, run by others."""
        return hasattr(self.cache, "filter") and self.told.get("start") is None

    def variant(self) -> mx.array | None:
        """int32 [1 or B]: which configuration each row wants; None: the first for all."""
        known = getattr(self.cache, "variant", None)
        return self.told.get("variant") if known is None else known


Tap = Callable[[mx.array, Place], mx.array]  # ([B, T, D] as the module gave it, where) -> what goes on instead

NOWHERE = Place(None, 0, {})


def anywhere(tap: Tap) -> Tap:
    """Marks a tap that does not look at its place: finding that out takes longer than the tap itself."""
    tap.anywhere = True  # pyright: ignore[reportFunctionMemberAccess]
    return tap


class _Now(threading.local):
    place: Place = NOWHERE
    told: dict[str, Any] = {}
    counted: tuple[Any, Any] | None = None  # a cache that counts tokens and what it had counted, as the blocks began


_now = _Now()


@contextmanager
def tell(
    *, variant: mx.array | None = None, last_prompt: mx.array | None = None, start: int | None = None
) -> Iterator[None]:
    """Inside, models that run without caches of ours know each row's configuration and last prompt token.

    Both int32 [B], or [1] for all rows. start: position of the first column, the same in all rows, for caches that
    count no tokens; who gives it moves what taps keep with a cache as he moves the rows in it. Not for compiled
    functions: these would keep what they were told first.
    """
    before = _now.told
    _now.told = {"variant": variant, "last_prompt": last_prompt, "start": start}
    try:
        yield
    finally:
        _now.told = before


class Handle:
    """A tap that is on; `remove` takes it off, in any order with others."""

    def __init__(self, places: list[tuple[Any, str, Tap]]) -> None:
        self.places = places

    def remove(self) -> None:
        """Take it off; twice does nothing."""
        for module, kind, tap in self.places:
            module._taps[kind].remove(tap)  # one of it: others may have put the same
            outermost = "tapped_by_taps" in vars(type(module))  # else another wrapper came after: it stays as it is
            if outermost and not any(module._taps.values()):
                object.__delattr__(module, "_taps")
                module.__class__ = type(module).tapped_by_taps
        self.places = []


def put(model: nn.Module, path: str, tap: Tap, *, before: bool = False) -> Handle:
    """Call `tap` on what the module at `path` gives: a decoder block or any module inside one.

    before: on what the block reads instead. Raises UserError for a path that is not there, or outside the blocks.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    block = next((b for b in blocks_of(model) if path == b or path.startswith(b + ".")), None)
    if path not in modules or block is None:
        raise UserError(f"{path}: the model has no such block, and no such layer in a block")
    if before and path != block:
        raise UserError(f"{path}: only what a whole block reads can be tapped")
    places = [(modules[path], "before" if before else "after", tap)]
    if path != block:  # the block says where in the text its layers are
        places.append((modules[block], "inside", tap))
    makers = {id(modules[block]): _block, id(stack := modules[".".join(block.split(".")[:-2])]): _stack}
    places.append((stack, "inside", tap))  # and what runs the blocks, where one has no cache that counts
    for module, kind, _ in places:
        if not hasattr(type(module), "tapped_by_taps"):
            object.__setattr__(module, "_taps", {"before": [], "after": [], "inside": []})
            module.__class__ = _tapped(type(module), makers.get(id(module), _layer))
        module._taps[kind].append(tap)
    return Handle(places)


@contextmanager
def untapped(model: nn.Module) -> Iterator[None]:
    """Inside, no tap is called."""
    tapped: list[Any] = [module for _, module in model.named_modules() if hasattr(module, "_taps")]
    before = [module._taps for module in tapped]
    for module in tapped:
        object.__setattr__(module, "_taps", {kind: [] for kind in module._taps})
    try:
        yield
    finally:
        for module, kept in zip(tapped, before, strict=True):
            object.__setattr__(module, "_taps", kept)


def blocks(model: nn.Module) -> list[str]:
    """Paths of the decoder blocks, in order."""
    return blocks_of(model)


def hold(model: nn.Module, arrays: dict[str, mx.array], variants: int = 1) -> nn.Module:
    """A holder of arrays for taps, part of `model.state` until `release`; neither trained nor saved.

    variants: how many configurations these arrays have rows for; 1: the same for all.
    """
    holder = nn.Module()
    holder.variants = variants  # pyright: ignore[reportAttributeAccessIssue]
    for name, array in arrays.items():
        holder[name] = array
    model.setdefault(HELD, {})[f"h{id(holder)}"] = holder
    return holder


def variants(model: nn.Module) -> int | None:
    """How many configurations rows can choose from; None: any number gives the same."""
    counts = [holder.variants for holder in model.get(HELD, {}).values() if holder.variants > 1]
    return min(counts, default=None)


def release(model: nn.Module, holder: nn.Module) -> None:
    """Let go of a holder; twice does nothing."""
    held = model.get(HELD, {})
    held.pop(f"h{id(holder)}", None)
    if not held:
        model.pop(HELD, None)


def _tapped(base: type, make: Callable[[type], Callable[..., Any]]) -> type:
    return type(base.__name__, (base,), {"tapped_by_taps": base, "__call__": make(base)})


def _stack(base: type) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, _now.counted = _now.counted, _counted(args, kwargs)
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            _now.counted = outer

    return call


def _block(base: type) -> Callable[..., Any]:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        nowhere = all(hasattr(tap, "anywhere") for taps in self._taps.values() for tap in taps)
        outer, _now.place = _now.place, NOWHERE if nowhere else _place(args, kwargs)
        try:
            place = _now.place
            for tap in tuple(self._taps["before"]):
                x = tap(x, place)
            return _through(self._taps["after"], base.__call__(self, x, *args, **kwargs), place)
        finally:
            _now.place = outer

    return call


def _layer(base: type) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _through(self._taps["after"], base.__call__(self, *args, **kwargs), _now.place)

    return call


def _through(taps: list[Tap], out: Any, place: Place) -> Any:
    """Some modules give more than one thing; the first is what is added to the stream."""
    x, *rest = out if isinstance(out, tuple) else (out,)
    for tap in tuple(taps):
        x = tap(x, place)
    return (x, *rest) if isinstance(out, tuple) else x


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
    """Before the block runs: stock caches count its columns while it does.

    Some blocks have no cache, or one that counts nothing (convolutions, state spaces): another block's says where.
    """
    is_cache = lambda x: hasattr(x, "update_and_fetch") or hasattr(x, "state")  # noqa: E731
    own = kwargs.get("cache", next((arg for arg in args if is_cache(arg)), None))
    counted = _counting(own) or _now.counted
    cache, start = (own, None if own is not None else 0) if counted is None else counted
    told = _now.told.get("start")
    return Place(cache, start if told is None else told, _now.told)


def _counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The first cache that counts tokens, with what it had counted, of those that a model is run with."""
    several = [x for x in (kwargs.get("cache"), *args) if isinstance(x, list | tuple)]
    return next((found for caches in several for cache in caches if (found := _counting(cache))), None)


def _counting(cache: Any) -> tuple[Any, Any] | None:
    for one in (cache, *getattr(cache, "caches", ())):
        if (start := getattr(one, "offset", None)) is not None:
            return one, start + 0 if isinstance(start, mx.array) else start  # it is counted up in place
    return None
