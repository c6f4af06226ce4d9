# SPDX-License-Identifier: Apache-2.0
"""Ways through an unmodified mlx-lm model to the hidden states of completion tokens.

Shared: each prompt is computed once, and its keys and values or states (kept differentiable) serve all its
completions, through mlx-lm's cache protocol (see prompt_caches). Even: the same for prompts of one length at a time,
without padding. Plain: one right-padded row per completion. All return hidden states that predict the completions'
tokens and those that predict the prompts' own; the head is applied elsewhere, in chunks, to those that are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from . import balance, calls, taps
from .batch import Batch, Strip
from .errors import said
from .prompt_caches import (
    PackedRows,
    PromptReader,
    PromptRecorder,
    StateReader,
    StateRecorder,
    moved,
    read,
    record,
    window_of,
)

STOPS = "the model's code stops there"
BY_LENGTH = ("DynamicNTKScalingRoPE",)  # in mlx-lm: they scale positions by how far the pass that they see goes
READERS = (PromptReader, StateReader)
RECORDERS = (PromptRecorder, StateRecorder)  # these and readers are caches that are not decoded with
WINDOW = 4  # attention windows are shrunk to this for a check, so that a short prompt is longer than them
WINDOWS = "window window_size sliding_window sliding_window_size attention_window_size loop_window_size".split()
WINDOWS += ["attention_chunk_size"]

Hidden = Callable[..., mx.array]  # (tokens, cache=None) -> hidden states [rows, columns, D]


class States(NamedTuple):
    """Hidden states, of the residual stream's dtype."""

    completion: mx.array  # [R, Lc, D]
    prompt: mx.array  # [P, Lp - 1, D]: they predict the batch's prompts but for the first token; anything before pads


def shareable(model: nn.Module, *, padded: bool) -> str | None:
    """Why prompts cannot be shared on this model, or None: keys and values can be, plain and rotating, and states.

    padded: with padding before them, which is no part of keys and values alone.
    """
    kinds = {type(entry) for entry in calls.caches(make_prompt_cache(model))} - {KVCache, RotatingKVCache, ArraysCache}
    if kinds:
        return f"its cache holds {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if why := by_length(model):
        return why
    if padded and stateful(model):
        return "its states would be others"
    token, rows = mx.zeros((5, 2), mx.int32), mx.zeros(5, mx.int32)  # one row would be broadcast to any shape
    try:  # nothing is computed: a model file that takes other caches than mlx-lm's amiss does so before
        recorders = record(model, rows if padded else None, 2)
        model(token, cache=recorders)
        model(token, cache=read(recorders, rows, 2))
    except Exception as error:  # whatever an architecture raises, its rows are computed alone
        return f"{STOPS} ({said(error)})"
    return None


def by_length(model: nn.Module) -> str | None:
    """Why a text may not be computed in pieces or beside others, where its positions forbid that."""
    scaled = any(type(module).__name__ in BY_LENGTH for module in model.modules())
    return "its positions depend on how long the whole text is" if scaled else None


def stateful(model: nn.Module) -> bool:
    """Whether some layers sum up all tokens in a state, which padding before a prompt would be part of."""
    return any(isinstance(entry, ArraysCache) for entry in calls.caches(make_prompt_cache(model)))


def several(model: nn.Module) -> bool:
    """Whether some layers have more than one cache."""
    return any(isinstance(entry, CacheList) for entry in make_prompt_cache(model))


def windows(model: nn.Module) -> list[int | None]:
    """Of each layer's attention: how many tokens it looks back, None without a limit."""
    return [window_of(entry) for entry in make_prompt_cache(model)]


@contextmanager
def shrunk_windows(model: nn.Module) -> Iterator[None]:
    """Inside, every sliding attention window of the model, and every chunk, is 4 tokens."""
    before: list[tuple[Any, str, int]] = []
    for module in (m for _, m in model.named_modules()):
        settings = [getattr(module, name, None) for name in ("args", "config")]
        for holder in (module, *settings, *(getattr(one, "text_config", None) for one in settings)):
            for name in WINDOWS:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                    before.append((holder, name, value))
                    setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def shared(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """With every prompt computed once."""
    width = batch.prompt.shape[1] - 1
    if not width and batch.prompt_pad is None:
        return _rows(model, hidden, batch)
    if not width:  # the last tokens begin the rows: there is nothing before them to share
        return plain(model, hidden, batch)
    recorders = record(model, batch.prompt_pad, width, lead=batch.lead)
    ahead = hidden(batch.prompt[:, :-1], recorders)

    def run(strip: Strip) -> mx.array:
        return hidden(strip.tokens, read(recorders, batch.row_prompt[strip.rows], width))

    return States(_completions(batch, run), ahead)


def _rows(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """Of an exact batch that shares nothing: every row begins with its text's first token."""
    if batch.pack is not None:
        caches = [PackedRows(batch.pack, window) for window in windows(model)]
        packed = hidden(batch.pack.tokens, caches)
        flat = moved(packed.reshape(-1, packed.shape[-1]), batch.pack.documents, batch.pack.back)
        found = flat.reshape(*batch.completion.shape, -1)
        return States(found, mx.zeros((batch.prompt.shape[0], 0, found.shape[2]), found.dtype))
    shortest = min((window for window in windows(model) if window), default=None)

    def run(strip: Strip) -> mx.array:
        last, width = batch.ahead[batch.row_prompt][strip.rows], strip.tokens.shape[1]
        if shortest is not None and shortest < width:  # ours say "band" where mlx-lm makes an array
            return hidden(strip.tokens, record(model, None, 0, lead=last))
        with taps.tell(last_prompt=last):
            return hidden(strip.tokens)

    found = _completions(batch, run)
    return States(found, mx.zeros((batch.prompt.shape[0], 0, found.shape[2]), found.dtype))


def _completions(batch: Batch, run: Callable[[Strip], mx.array]) -> mx.array:
    """[R, Lc, D]: hidden states of every strip in its place; of a batch without strips it is one."""
    if not batch.strips:
        last = batch.prompt[:, -1][batch.row_prompt][:, None]
        return run(Strip(mx.arange(last.shape[0]), mx.concatenate([last, batch.completion[:, :-1]], 1)))
    width = batch.completion.shape[1]
    found = [mx.pad(x, [(0, 0), (0, width - x.shape[1]), (0, 0)]) for x in map(run, batch.strips)]
    order = mx.argsort(mx.concatenate([strip.rows for strip in batch.strips]))
    return mx.concatenate(found)[order]


def even(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """As `shared`, prompts of one length at a time: no position is below 0, as those of padding are. Not compiled."""
    if batch.prompt_pad is None:
        return shared(model, hidden, batch)
    width, parts = batch.prompt.shape[1], even_parts(batch)
    found = [shared(model, hidden, part) for part, _, _ in parts]
    ahead = [mx.pad(x.prompt, [(0, 0), (width - 1 - x.prompt.shape[1], 0), (0, 0)]) for x in found]
    prompts, rows = (mx.array(np.argsort(np.concatenate(which))) for which in list(zip(*parts, strict=True))[1:])
    return States(mx.concatenate([x.completion for x in found])[rows], mx.concatenate(ahead)[prompts])


def even_parts(batch: Batch) -> list[tuple[Batch, np.ndarray, np.ndarray]]:
    """A batch cut by the lengths of its prompts, and which prompts and rows each part has; `positions` stay."""
    pad, row_prompt, found = np.array(batch.pad), np.array(batch.row_prompt), []
    for n in np.unique(pad):
        prompts, rows = np.flatnonzero(pad == n), np.flatnonzero(pad[row_prompt] == n)
        part = batch._replace(
            prompt=batch.prompt[mx.array(prompts)][:, int(n) :],
            prompt_pad=None,
            completion=batch.completion[mx.array(rows)],
            row_prompt=mx.array(np.searchsorted(prompts, row_prompt[rows]).astype(np.int32)),
            mask=batch.mask[mx.array(rows)],
        )
        found.append((part, prompts, rows))
    return found


def plain(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """With each row computed alone: prompt and completion in a row, padded on the right."""
    if batch.prompt_pad is None and batch.prompt.shape[1] == 1:
        return _rows(model, hidden, batch)
    width, rows = batch.prompt.shape[1], batch.completion.shape[0]
    pad = batch.pad[batch.row_prompt][:, None]
    length = batch.completion.shape[1]
    joined = mx.concatenate([batch.prompt[batch.row_prompt], batch.completion, mx.zeros((rows, width), mx.int32)], 1)
    columns = mx.arange(width + length - 1)[None] + pad  # drop the left pad: rows start at their first token
    with taps.tell(last_prompt=width - 1 - pad[:, 0] + batch.ahead[batch.row_prompt]):
        states = hidden(mx.take_along_axis(joined, columns, 1))
    wanted = mx.arange(length)[None] + (width - 1 - pad)
    first = first_rows(batch)
    ahead = mx.maximum(mx.arange(width - 1)[None] - pad[first], 0)
    completion = mx.take_along_axis(states, wanted[..., None], 1)
    return States(completion, mx.take_along_axis(states[first], ahead[..., None], 1))


def first_rows(batch: Batch) -> mx.array:
    """int32 [P]: a row of each prompt."""
    return mx.argmax(batch.row_prompt[None] == mx.arange(batch.prompt.shape[0])[:, None], 1)


def token_weights(batch: Batch, sharing: bool, even: bool = False) -> list[mx.array]:
    """float32 [tokens] of each pass through the model: how many rows a token belongs to, 0 for padding.

    The same tokens count in both ways: a shared prompt's once for each of its completions, as if it were repeated. What
    follows a row's last trained token does not count.
    """
    exact = batch.prompt_pad is None
    if sharing and even and not exact:
        return [weights for part, _, _ in even_parts(batch) for weights in token_weights(part, True)]
    columns = mx.arange(batch.completion.shape[1])[None]
    length = mx.where(batch.mask, columns + 1, 0).max(1, keepdims=True)
    width, pad = batch.prompt.shape[1], batch.pad[:, None]
    if not sharing or (width < 2 and not exact):
        tokens = width - pad[batch.row_prompt] + length - 1
        return [(mx.arange(width + columns.size - 1)[None] < tokens).astype(mx.float32).reshape(-1)]
    strips = [(strip.tokens.shape[1], length[strip.rows]) for strip in batch.strips] or [(columns.size, length)]
    found = [(columns[:, :n] < lengths).astype(mx.float32).reshape(-1) for n, lengths in strips]
    if width < 2:
        return found
    rows = mx.zeros(pad.shape).at[batch.row_prompt].add(1.0)
    return [mx.where(mx.arange(width - 1)[None] >= pad, rows, 0.0).reshape(-1), *found]


def layers_of(model: nn.Module) -> list[Any]:
    """The model's decoder blocks, in order."""
    return list(getattr(model, "layers", ()))


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute each layer in the backward pass; composes with shared prompts and is undone by `uncheckpoint_layers`.

    Keys, values and what routers say travel as arguments and results: as side effects they would lose their gradient.
    """
    for layer in layers_of(model):
        if not hasattr(type(layer), "checkpointed_from"):
            layer.__class__ = _checkpointed(type(layer))
        object.__setattr__(layer, "recomputed", True)
        object.__setattr__(layer, "ran", False)


def recomputing(model: nn.Module) -> bool:
    """Whether a layer was run as one to be recomputed since `checkpoint_layers`; some models call only their parts."""
    return any(getattr(layer, "ran", False) for layer in layers_of(model))


def uncheckpoint_layers(model: nn.Module) -> None:
    """Back to the layers' own classes; one that was tapped since keeps its taps."""
    for layer in layers_of(model):
        if hasattr(type(layer), "checkpointed_from"):
            object.__setattr__(layer, "recomputed", False)
        if "checkpointed_from" in vars(type(layer)):
            layer.__class__ = type(layer).checkpointed_from


@dataclass
class _Given:
    """In the place of an array that a layer is called with."""

    index: int


def _checkpointed(base: type) -> type:
    class Checkpointed(base):  # a subclass: parameter paths stay as they are
        checkpointed_from = base

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            caches = list(calls.caches(*args, *kwargs.values()))
            decoding = any(not isinstance(cache, (*READERS, *RECORDERS)) for cache in caches)
            if decoding or not self.recomputed:
                return base.__call__(self, *args, **kwargs)  # decoding keeps its own cache
            object.__setattr__(self, "ran", True)
            recording = any(isinstance(cache, RECORDERS) and not isinstance(cache, READERS) for cache in caches)
            given: list[mx.array] = []  # what comes from below: the stream, keys and values that a layer is lent

            def place(value: Any) -> Any:
                if not (isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)):
                    return value
                given.append(value)
                return _Given(len(given) - 1)

            left_out = tree_map(place, (args, kwargs))

            def run(parameters: dict[str, Any], given: list[mx.array], *kv: mx.array) -> tuple[Any, ...]:
                own = _copies(caches, [] if recording else kv)

                def swap(value: Any) -> Any:
                    if isinstance(value, CacheList):
                        return CacheList(*map(swap, value.caches))
                    return given[value.index] if isinstance(value, _Given) else own.get(id(value), value)

                args, kwargs = tree_map(swap, left_out)
                kept = self.trainable_parameters()
                self.update(parameters)
                with balance.listening() as heard:
                    out = base.__call__(self, *args, **kwargs)
                self.update(kept)
                kept_kv = [cache.kv for cache in own.values()] if recording else []
                if isinstance(out, tuple):  # it may hold them too, and an array that is given twice gets one gradient
                    kept_kv = tree_map(mx.contiguous, kept_kv)
                return out, kept_kv, tuple(heard)

            lent = [] if recording else [x for cache in caches for x in cache.kv]
            out, kv, heard = mx.checkpoint(run)(self.trainable_parameters(), given, *lent)
            for cache, kept in zip(caches, kv, strict=False):
                cache.kv = tuple(kept)
            balance.tell(heard)
            return out

    Checkpointed.__name__ = base.__name__
    return Checkpointed


def _copies(caches: Sequence[Any], kv: Sequence[mx.array]) -> dict[int, Any]:
    """Of each cache another one by its id, with its share of these arrays."""
    found, left = {}, list(kv)
    for cache in caches:
        own = object.__new__(type(cache))
        own.__dict__.update(cache.__dict__)
        own.kv = tuple(left.pop(0) for _ in cache.kv) if left else ()
        found[id(cache)] = own
    return found


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """What fails inside leaves the model's arrays as they were: a trace that breaks off puts its placeholders there."""
    before = tree_map(lambda x: x, model.state)
    try:
        yield
    except BaseException:
        _put_back(model.state, before)
        raise


def _put_back(tree: Any, arrays: Any) -> None:
    """Into a tree of dicts and lists the arrays of a copy of it."""
    for key, value in arrays.items() if isinstance(arrays, dict) else enumerate(arrays):
        if isinstance(value, mx.array):
            tree[key] = value
        elif isinstance(value, dict | list):
            _put_back(tree[key], value)
