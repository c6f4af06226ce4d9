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

from . import calls
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
PROBE = mx.array([[1, 2]])


def anywhere(tap: Tap) -> Tap:
    """Marks a tap that does not look at its place: finding that out takes longer than the tap itself."""
    tap.anywhere = True  # pyright: ignore[reportFunctionMemberAccess]
    return tap


class _Now(threading.local):
    place: Place = NOWHERE
    told: dict[str, Any] = {}
    caches: list[Any] | None = None  # those that the blocks are run with; None: nobody knows
    counted: tuple[Any, Any] | None = None  # the first of them that counts tokens, and what it had counted by then


_now = _Now()


@contextmanager
def tell(
    *, variant: mx.array | None = None, last_prompt: mx.array | None = None, start: int | mx.array | None = None
) -> Iterator[None]:
    """Inside, models that run without caches of ours know each row's configuration and last prompt token.

    Both int32 [B], or [1] for all rows. start: position of the first column, int or int32 [B], for caches that
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

    before: on what the block reads instead. Raises UserError for a path that is not there or outside the blocks, and
    where a tap would do nothing: the first time, all blocks of the model are tried in one pass over a few tokens.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    block = next((b for b in blocks_of(model) if path == b or path.startswith(b + ".")), None)
    if path not in modules or block is None:
        raise UserError(f"{path}: the model has no such block, and no such layer in a block")
    if before and path != block:
        raise UserError(f"{path}: only what a whole block reads can be tapped")
    if why := inert(model).get(block):
        raise UserError(f"{block}: {why}, so its states can be neither read nor changed. Use another block or model.")
    return _put(model, modules, path, block, tap, before)


def inert(model: nn.Module) -> dict[str, str]:
    """Blocks where a tap would do nothing, or not what it is meant to do, by path, and why. Found out once, by trying.

    Row i + 1 of a batch of equal rows has block i's output turned round: its logits must then differ from row 0's.
    """
    paths = blocks_of(model)
    known: dict[tuple[str, ...], dict[str, str]] = model.__dict__.setdefault("_inert", {})
    if tuple(paths) not in known:
        known[tuple(paths)] = _tried(model, paths)
    return known[tuple(paths)]


def _tried(model: nn.Module, paths: list[str]) -> dict[str, str]:
    modules: dict[str, Any] = dict(model.named_modules())
    kind = getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    rows = len(paths) + 1
    why = {path: f"{kind} models compute with the parts of this block and never call it" for path in paths}

    def turn(x: Any, i: int) -> Any:
        path = paths[i]
        if not isinstance(x, mx.array):
            why[path] = f"in {kind} models this block gives a {type(x).__name__}, not one array"
        elif x.ndim != 3 or x.shape[:2] != (rows, PROBE.size):
            why[path] = f"in {kind} models this block gives an array {list(x.shape)} for {rows} texts of "
            why[path] += f"{PROBE.size} tokens: it has several residual streams, or none with one vector per token"
        else:
            why.pop(path, None)
            return mx.where(mx.arange(rows)[:, None, None] == i + 1, -x[..., ::-1], x)
        return x

    handles = [_put(model, modules, p, p, anywhere(lambda x, _, i=i: turn(x, i)), False) for i, p in enumerate(paths)]
    try:
        out = model(mx.broadcast_to(PROBE, (rows, PROBE.size)))[:, -1].astype(mx.float32)
        moved = mx.abs(out - out[:1]).max(-1) / mx.maximum(mx.abs(out[0]).max(), 1e-30)
        answers: Any = moved[1:].tolist()
        for path, by in zip(paths, answers, strict=True):
            if by < 1e-3:  # rounding, which batches of several rows may bring
                why.setdefault(path, f"in {kind} models what this block gives does not reach the logits")
    finally:
        for handle in handles:
            handle.remove()
    return why


def _put(model: nn.Module, modules: dict[str, Any], path: str, block: str, tap: Tap, before: bool) -> Handle:
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


def hold(model: nn.Module, arrays: dict[str, mx.array], variants: int = 1, reach: int | None = None) -> nn.Module:
    """A holder of arrays for taps, part of `model.state` until `release`; neither trained nor saved.

    variants: how many configurations these arrays have rows for; 1: the same for all. reach: see `reach`.
    """
    holder: Any = nn.Module()
    holder.variants, holder.reach = variants, reach
    for name, array in arrays.items():
        holder[name] = array
    model.setdefault(HELD, {})[f"h{id(holder)}"] = holder
    return holder


def variants(model: nn.Module) -> int | None:
    """How many configurations rows can choose from; None: any number gives the same."""
    counts = [holder.variants for holder in model.get(HELD, {}).values() if holder.variants > 1]
    return min(counts, default=None)


def reach(model: nn.Module) -> int | None:
    """How many tokens before a prompt's end taps treat otherwise than if the prompt went on; None: none, nor any after.

    A cache that is kept for a longer text must lose what was computed from there on.
    """
    return max((h.reach for h in model.get(HELD, {}).values() if h.reach is not None), default=None)


def held(model: nn.Module) -> list[mx.array]:
    """All arrays of its holders: other ones where taps have come or gone, or a number of theirs has changed."""
    return [array for holder in model.get(HELD, {}).values() for array in holder.values()]


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
        outer = _now.caches, _now.counted
        _now.caches = list(calls.caches(*args, *kwargs.values()))
        _now.counted = _counting(_now.caches)
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            _now.caches, _now.counted = outer

    return call


def _block(base: type) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nowhere = all(hasattr(tap, "anywhere") for taps in self._taps.values() for tap in taps)
        outer, _now.place = _now.place, NOWHERE if nowhere else _place(args, kwargs)
        try:
            place = _now.place
            if taps := tuple(self._taps["before"]):
                x = calls.first(base, args, kwargs)
                for tap in taps:
                    x = tap(x, place)
                args, kwargs = calls.with_first(base, x, args, kwargs)
            return _through(self._taps["after"], base.__call__(self, *args, **kwargs), place)
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

    Some blocks have no cache, or one that counts nothing (convolutions, state spaces): another block's says where. One
    that a model run without caches makes for itself (to lend keys and values to other blocks) is none.
    """
    own = list(calls.caches(*args, *kwargs.values())) if _now.caches != [] else []
    cache = next(iter([*own, *(_now.caches or ())]), None)
    if (told := _now.told.get("start")) is not None:
        return Place(cache, told, _now.told)
    cache, start = _counting(own) or _now.counted or (cache, 0 if cache is None else None)
    return Place(cache, start, _now.told)


def _counting(caches: list[Any]) -> tuple[Any, Any] | None:
    for one in caches:
        if (start := getattr(one, "offset", None)) is not None:
            return one, start + 0 if isinstance(start, mx.array) else start  # it is counted up in place
    return None
