# SPDX-License-Identifier: Apache-2.0
"""Ways through an unmodified mlx-lm model to the hidden states of completion tokens.

Shared: each prompt is computed once, and its keys and values (kept differentiable) serve all its completions, through
mlx-lm's cache protocol (`offset`, `update_and_fetch`, `make_mask`). Even: the same for prompts of one length at a time,
without padding. Plain: one right-padded row per completion. All return hidden states that predict the completions'
tokens and those that predict the prompts' own; the head is applied elsewhere, in chunks, to those that are asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from . import balance, calls, taps
from .batch import Batch
from .errors import said

STOPS = "the model's code stops there"
WINDOW = 4  # attention windows are shrunk to this for a check, so that a short prompt is longer than them
WINDOWS = "window window_size sliding_window sliding_window_size attention_window_size loop_window_size".split()
WINDOWS += ["attention_chunk_size"]

Hidden = Callable[..., mx.array]  # (tokens, cache=None) -> hidden states [rows, columns, D]


class States(NamedTuple):
    """Hidden states, of the residual stream's dtype."""

    completion: mx.array  # [R, Lc, D]
    prompt: mx.array  # [P, Lp - 1, D]: they predict every prompt token but the first; anything where the prompt is pad


class PromptRecorder:
    """Cache of one layer while the prompts are computed: keeps keys and values as they come, graph and all."""

    variant: mx.array | None = None  # int32 [P]: the configuration of each row that taps ask for
    last_prompt: mx.array | None = None  # int32 [P]: position of each prompt's last token, which comes after these

    def __init__(self, pad: mx.array, window: int | None) -> None:
        self.pad, self.window, self.offset = pad, window, -pad
        self.kv: tuple[mx.array, ...] = ()
        self.notes: dict[str, mx.array] = {}  # [P, ...]: what taps keep of each prompt, handed on to its rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.kv = (keys, values)
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        return _mask(0, n, self.pad, window_size or self.window)


class PromptReader:
    """Cache of one layer while the completions are computed: keys and values = [those of the row's prompt, own]."""

    def __init__(self, recorder: PromptRecorder, rows: mx.array) -> None:
        self.kv = tuple(x[rows] for x in recorder.kv)
        self.prefix = recorder.kv[0].shape[2]
        self.pad, self.window = recorder.pad[rows], recorder.window
        self.offset = self.last_prompt = self.prefix - self.pad
        self.variant = None if recorder.variant is None else recorder.variant[rows]
        self.notes = {name: x[rows] for name, x in recorder.notes.items()}

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self.kv[0], keys], 2), mx.concatenate([self.kv[1], values], 2)

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        return _mask(self.prefix, n, self.pad, window_size or self.window)


def _mask(start: int, n: int, pad: mx.array, window: int | None) -> mx.array:
    """bool [rows, 1, n, start + n], True = may look: causal, no pad column, within the window.

    Pad queries look at themselves, so that no row of the softmax is empty.
    """
    query, key = mx.arange(start, start + n)[:, None], mx.arange(start + n)[None]
    seen = query >= key
    if window is not None:
        seen = seen & (query - key < window)
    return (seen & (pad[:, None, None, None] <= key)) | (query == key)


def shareable(model: nn.Module) -> str | None:
    """Why prompts cannot be shared on this model, or None: only plain and rotating key-value caches can."""
    entries = make_prompt_cache(model)
    kinds = {type(entry) for entry in entries} - {KVCache, RotatingKVCache}
    if kinds:
        return f"its cache holds {', '.join(sorted(kind.__name__ for kind in kinds))}"
    token, rows = mx.zeros((1, 1), mx.int32), mx.zeros(1, mx.int32)
    try:  # nothing is computed: a model file that takes other caches than mlx-lm's amiss does so before
        recorders = record(model, rows, 1)
        model(token, cache=recorders)
        model(token, cache=[PromptReader(recorder, rows) for recorder in recorders])
    except Exception as error:  # whatever an architecture raises, its rows are computed alone
        return f"{STOPS} ({said(error)})"
    return None


def windows(model: nn.Module) -> list[int | None]:
    """Of each layer's attention: how many tokens it looks back, None without a limit."""
    return [getattr(entry, "max_size", None) for entry in make_prompt_cache(model)]


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


def record(model: nn.Module, pad: mx.array, width: int, variant: mx.array | None = None) -> list[PromptRecorder]:
    """Recorders for prompts without their last tokens: `width` columns, of which pad int32 [P] are empty."""
    recorders = [PromptRecorder(pad, window) for window in windows(model)]
    for recorder in recorders:
        recorder.last_prompt, recorder.variant = width - pad, variant
    return recorders


def shared(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """With every prompt computed once."""
    prompt, completion = batch.prompt, batch.completion
    if prompt.shape[1] < 2:  # the last tokens begin the rows: there is nothing before them to share
        return plain(model, hidden, batch)
    recorders = record(model, batch.prompt_pad, prompt.shape[1] - 1)
    ahead = hidden(prompt[:, :-1], recorders)
    readers = [PromptReader(recorder, batch.row_prompt) for recorder in recorders]
    tokens = mx.concatenate([prompt[:, -1][batch.row_prompt][:, None], completion[:, :-1]], 1)
    return States(hidden(tokens, readers), ahead)


def even(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """As `shared`, prompts of one length at a time: no position is below 0, as those of padding are. Not compiled."""
    width, parts = batch.prompt.shape[1], even_parts(batch)
    found = [shared(model, hidden, part) for part, _, _ in parts]
    ahead = [mx.pad(x.prompt, [(0, 0), (width - 1 - x.prompt.shape[1], 0), (0, 0)]) for x in found]
    prompts, rows = (mx.array(np.argsort(np.concatenate(which))) for which in list(zip(*parts, strict=True))[1:])
    return States(mx.concatenate([x.completion for x in found])[rows], mx.concatenate(ahead)[prompts])


def even_parts(batch: Batch) -> list[tuple[Batch, np.ndarray, np.ndarray]]:
    """A batch cut by the lengths of its prompts, and which prompts and rows each part has; `positions` stay."""
    pad, row_prompt, found = np.array(batch.prompt_pad), np.array(batch.row_prompt), []
    for n in np.unique(pad):
        prompts, rows = np.flatnonzero(pad == n), np.flatnonzero(pad[row_prompt] == n)
        part = batch._replace(
            prompt=batch.prompt[mx.array(prompts)][:, int(n) :],
            prompt_pad=mx.zeros(len(prompts), mx.int32),
            completion=batch.completion[mx.array(rows)],
            row_prompt=mx.array(np.searchsorted(prompts, row_prompt[rows]).astype(np.int32)),
            mask=batch.mask[mx.array(rows)],
        )
        found.append((part, prompts, rows))
    return found


def plain(model: nn.Module, hidden: Hidden, batch: Batch) -> States:
    """With each row computed alone: prompt and completion in a row, padded on the right."""
    width, rows = batch.prompt.shape[1], batch.completion.shape[0]
    pad = batch.prompt_pad[batch.row_prompt][:, None]
    length = batch.completion.shape[1]
    joined = mx.concatenate([batch.prompt[batch.row_prompt], batch.completion, mx.zeros((rows, width), mx.int32)], 1)
    columns = mx.arange(width + length - 1)[None] + pad  # drop the left pad: rows start at their first token
    with taps.tell(last_prompt=width - 1 - pad[:, 0]):
        states = hidden(mx.take_along_axis(joined, columns, 1))
    wanted = mx.arange(length)[None] + (width - 1 - pad)
    first = mx.argmax(batch.row_prompt[None] == mx.arange(batch.prompt.shape[0])[:, None], 1)  # a row of each prompt
    ahead = mx.maximum(mx.arange(width - 1)[None] - pad[first], 0)
    completion = mx.take_along_axis(states, wanted[..., None], 1)
    return States(completion, mx.take_along_axis(states[first], ahead[..., None], 1))


def token_weights(batch: Batch, sharing: bool, even: bool = False) -> list[mx.array]:
    """float32 [tokens] of each pass through the model: how many rows a token belongs to, 0 for padding.

    The same tokens count in both ways: a shared prompt's once for each of its completions, as if it were repeated. What
    follows a row's last trained token does not count.
    """
    if sharing and even:
        return [weights for part, _, _ in even_parts(batch) for weights in token_weights(part, True)]
    columns = mx.arange(batch.completion.shape[1])[None]
    length = mx.where(batch.mask, columns + 1, 0).max(1, keepdims=True)
    width, pad = batch.prompt.shape[1], batch.prompt_pad[:, None]
    if not sharing or width < 2:
        tokens = width - pad[batch.row_prompt] + length - 1
        return [(mx.arange(width + columns.size - 1)[None] < tokens).astype(mx.float32).reshape(-1)]
    rows = mx.zeros(pad.shape).at[batch.row_prompt].add(1.0)
    prompt = mx.where(mx.arange(width - 1)[None] >= pad, rows, 0.0)
    return [prompt.reshape(-1), (columns < length).astype(mx.float32).reshape(-1)]


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
            decoding = any(not isinstance(cache, PromptRecorder | PromptReader) for cache in caches)
            if decoding or not self.recomputed:
                return base.__call__(self, *args, **kwargs)  # decoding keeps its own cache
            object.__setattr__(self, "ran", True)
            cache = caches[0] if caches else None
            recording = isinstance(cache, PromptRecorder)
            given: list[mx.array] = []  # what comes from below: the stream, keys and values that a layer is lent

            def place(value: Any) -> Any:
                if not (isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)):
                    return value
                given.append(value)
                return _Given(len(given) - 1)

            left_out = tree_map(place, (args, kwargs))

            def run(parameters: dict[str, Any], given: list[mx.array], *kv: mx.array) -> tuple[Any, ...]:
                own = _copy(cache, kv)

                def swap(value: Any) -> Any:
                    return given[value.index] if isinstance(value, _Given) else own if value is cache else value

                args, kwargs = tree_map(swap, left_out)
                kept = self.trainable_parameters()
                self.update(parameters)
                with balance.listening() as heard:
                    out = base.__call__(self, *args, **kwargs)
                self.update(kept)
                kept_kv = own.kv if recording else ()
                if isinstance(out, tuple):  # it may hold them too, and an array that is given twice gets one gradient
                    kept_kv = tuple(mx.contiguous(x) for x in kept_kv)
                return out, kept_kv, tuple(heard)

            kv = cache.kv if isinstance(cache, PromptReader) else ()
            out, kv, heard = mx.checkpoint(run)(self.trainable_parameters(), given, *kv)
            if recording:
                cache.kv = kv
            balance.tell(heard)
            return out

    Checkpointed.__name__ = base.__name__
    return Checkpointed


def _copy(cache: PromptRecorder | PromptReader | None, kv: tuple[mx.array, ...]) -> Any:
    if cache is None:
        return None
    own = object.__new__(type(cache))
    own.__dict__.update(cache.__dict__)
    own.kv = kv
    return own


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
