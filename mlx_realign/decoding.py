# SPDX-License-Identifier: Apache-2.0
"""One token at a time for many rows: the keys and values of a prompt are held once, however many rows complete it.

Rows are aligned at their newest token, so that a step writes one column for all of them; rows that began later have
padding on the left. `Decoder` takes rows in, lets rows go and computes steps; who comes when is the caller's business.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

from .forward import layers_of, windows
from .kernels.grouped_attention import Groups, fused
from .policy import Policy
from .prompt_caches import record
from .sampling import Sampling, pick

COLUMNS = 64  # own keys and values grow by this many tokens at least
PREFILL_TOKENS = 8192  # padded tokens of prompts that are computed together


@dataclass(eq=False)
class Row:
    """A completion being made."""

    prompt: np.ndarray  # int32 [Lp]
    group: int  # rows of one group share their prompt's keys and values
    uniform: np.ndarray  # float32 [max_new_tokens]
    tag: Any = None  # the caller's
    variant: int = 0  # the configuration that taps on the model apply to it; one for all rows of a group
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    done: bool = False


class Board:
    """What the caches of all layers have in common in a step: who shares which prompt, who sees which column."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.pad = np.zeros(0, np.int32)  # [P] columns of padding before each prompt
        self.row_prompt = np.zeros(0, np.int32)  # [B]
        self.width = 0  # columns of the prompts, their last tokens not among them
        self.column = 0  # own columns written before this step
        self.held = np.zeros(0, np.int32)  # [B] how many of them are a row's own
        self.grouped = True  # whether attention reads prompts once (`GroupCache.attend`), or copies them to each row
        self.lent = False  # whether layers without a cache use keys and values of others (Gemma 4 E2B)
        self.asked: set[int | None] = set()  # windows that the model's layers have
        self.at: mx.array | None = None  # int32 [1]: a compiled step gets its column as data, and all are looked at

    def begin(self) -> None:
        """Before each step: positions, and no masks yet."""
        ahead = self.width - self.pad[self.row_prompt]
        self.offset, self.last_prompt = mx.array(ahead + self.held), mx.array(ahead)
        self.masks: dict[int | None, mx.array | None] = {}

    def arrange(self, rows: list[Row], groups: list[int], pad: np.ndarray) -> None:
        """Set rows and prompts; groups: the group of each prompt."""
        self.rows, self.pad = rows, pad
        self.variant = mx.array([row.variant for row in rows], mx.int32)
        self.row_prompt = np.array([groups.index(row.group) for row in rows], np.int32)
        most = int(np.bincount(self.row_prompt, minlength=1).max()) if rows else 0
        members, place = np.zeros((len(groups), most), np.int32), np.zeros(len(rows), np.int32)
        taken = [0] * len(groups)
        for i, prompt in enumerate(self.row_prompt):
            members[prompt, taken[prompt]] = i
            place[i] = prompt * most + taken[prompt]
            taken[prompt] += 1
        regular = members.size == len(rows) and bool((members.reshape(-1) == np.arange(len(rows))).all())
        self.groups = Groups(mx.array(self.row_prompt), mx.array(members), mx.array(place), regular)

    def mask(self, window: int | None) -> mx.array | None:
        """bool [B, 1, 1, width + column + 1], True = look; None where every column is seen by all."""
        self.asked.add(window)
        if window not in self.masks:
            seen = self.sees(window, self.column + 1)
            self.masks[window] = None if seen.all() else mx.array(seen[:, None, None])
        return self.masks[window]

    def sees(self, window: int | None, columns: int) -> np.ndarray:
        """bool [B, width + columns]: which columns of its prompt and of its own each row's newest token looks at."""
        prompt, own = np.arange(self.width)[None], np.arange(columns)[None]
        pad, held = self.pad[self.row_prompt][:, None], self.held[:, None]
        seen = np.concatenate([prompt >= pad, (own >= self.column - held) & (own <= self.column)], 1)
        if window is not None:  # distance from the newest token
            ahead = np.broadcast_to(self.width - prompt + held, (len(held), self.width))
            behind = np.broadcast_to(self.column - own, (len(held), columns))
            seen &= np.concatenate([ahead, behind], 1) < window
        return seen


class GroupCache:
    """Cache of one layer while rows are decoded, by mlx-lm's protocol."""

    def __init__(self, board: Board, window: int | None) -> None:
        self.board, self.window = board, window
        self.prompt: tuple[mx.array, ...] = ()  # keys and values [P, Hkv, width, D]
        self.own: tuple[mx.array, ...] = ()  # [B, Hkv, capacity, D]
        self.notes: dict[str, mx.array] = {}  # [B, ...]: what taps keep of each row from step to step
        self.attended = False
        self.attend = self._attend if board.grouped else None  # what attention calls in the place of its own

    @property
    def offset(self) -> mx.array:
        """int32 [B]: position of the token being computed."""
        return self.board.offset

    @property
    def last_prompt(self) -> mx.array:
        """int32 [B]: position of the last token of the prompt."""
        return self.board.last_prompt

    @property
    def variant(self) -> mx.array:
        """int32 [B]: the configuration of each row."""
        return self.board.variant

    def reserve(self) -> None:
        """Room for one more column; by doubling, so that shapes change seldom."""
        held = self.own[0].shape[2] if self.own else 0
        if held <= self.board.column:
            shapes = [(len(self.board.rows), x.shape[1], max(COLUMNS, held), x.shape[3]) for x in self.prompt]
            more = [mx.zeros(shape, x.dtype) for shape, x in zip(shapes, self.prompt, strict=True)]
            both = zip(self.own, more, strict=True)
            self.own = tuple(mx.concatenate(list(pair), 2) for pair in both) if self.own else tuple(more)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        column, at = self.board.column, self.board.at
        if at is not None:
            both = zip(self.own, (keys, values), strict=True)
            self.own = tuple(mx.slice_update(own, new, at, (2,)) for own, new in both)
        else:
            for own, new in zip(self.own, (keys, values), strict=True):
                own[:, :, column : column + 1] = new
        if self.board.grouped:  # `attend` reads what it needs: a layer that is lent these asks them for it
            return (self, self) if self.board.lent else (keys, values)  # type: ignore[return-value]
        seen, rows = self._seen(), self.board.groups.row_prompt
        return tuple(mx.concatenate([a[rows], b], 2) for a, b in zip(self.prompt, seen, strict=True))  # type: ignore[return-value]

    def _attend(self, queries: mx.array, *, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """[B, H, 1, D] of queries [B, H, 1, D]."""
        self.attended = True
        return fused(queries, self.prompt, self._seen(), self.board.groups, scale=scale, mask=mask, sinks=sinks)  # type: ignore[arg-type]

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        return self.board.mask(window_size or self.window)

    def _seen(self) -> tuple[mx.array, ...]:
        return self.own if self.board.at is not None else tuple(x[:, :, : self.board.column + 1] for x in self.own)


class Decoder:
    """Rows in the making; each `step` gives every row a token."""

    joins = True  # whether rows can join those under way

    def __init__(self, policy: Policy, sampling: Sampling, *, grouped: bool) -> None:
        """grouped: attention goes through `GroupCache.attend`; else keys and values of prompts are copied to rows."""
        self.policy, self.sampling, self.board = policy, sampling, Board()
        self.board.grouped, self.board.lent = grouped, lends(policy)
        self.caches = [GroupCache(self.board, window) for window in windows(policy.model)]
        self.seen: mx.array | None = None
        self.ahead = policy.exact  # whether a step is begun before the tokens of the last one are read
        self.coming: tuple[mx.array, mx.array] | None = None  # tokens and log-probs of the step that is under way
        self.before: Any = None  # what it began with, as far as it is not written over
        self.compiled = mx.compile(self._compute, inputs=[policy.model.state]) if policy.compiled else None

    @property
    def rows(self) -> list[Row]:
        """Those in the batch, done or not."""
        return self.board.rows

    def admits(self, row: Row, live: Sequence[Row], new: Sequence[Row]) -> bool:
        """Whether a row may join `live` and `new` ones: always."""
        return True

    def exchange(self, kept: Sequence[Row], new: Sequence[Row]) -> None:
        """Only `kept` rows stay, in their order; new ones join, their prompts computed once per group."""
        board = self.board
        self._undo()
        at = [board.rows.index(row) for row in kept]
        groups = list(dict.fromkeys(row.group for row in kept))
        prompts = [int(board.row_prompt[at[[row.group for row in kept].index(g)]]) for g in groups]
        held = board.held[at] if at else np.zeros(0, np.int32)
        fresh = {row.group: row for row in new}
        width = max([board.width if kept else 0, *(max(len(row.prompt) - 1, 1) for row in fresh.values())])
        pad = [int(board.pad[p]) + width - board.width for p in prompts]
        made, notes = self._prefill(list(fresh.values()), width) if fresh else ([], [{}] * len(self.caches))
        rows, column = mx.array(at, mx.int32), int(held.max(initial=0))
        came = mx.array([list(fresh).index(row.group) for row in new], mx.int32)
        for i, cache in enumerate(self.caches):
            stay = [x[mx.array(prompts)] for x in cache.prompt] if kept else []
            stay = [mx.pad(x, [(0, 0), (0, 0), (width - x.shape[2], 0), (0, 0)]) for x in stay]
            both = [stay, *([made[i]] if made else [])]
            cache.prompt = tuple(mx.concatenate(list(parts)) for parts in zip(*(p for p in both if p), strict=True))
            cache.own = self._own(cache, rows, column, len(new)) if kept else ()
            cache.notes = _joined(cache.notes if kept else {}, rows, notes[i], came)
        mx.eval([(cache.prompt, cache.own, cache.notes) for cache in self.caches])
        board.width, board.column = width, column
        board.held = np.concatenate([held, np.zeros(len(new), np.int32)])
        pad += [width - (len(row.prompt) - 1) for row in fresh.values()]
        board.arrange([*kept, *new], [*groups, *fresh], np.array(pad, np.int32))
        if self.sampling.repetition_penalty != 1:
            self.seen = had(board.rows, self.policy.vocabulary)

    def step(self) -> None:
        """The next token of every row, with its log-prob, appended to it."""
        rows = self.board.rows
        tokens, logps = self.coming or self._begin()
        self.coming = None
        if self.ahead and any(len(row.tokens) + 1 < len(row.uniform) and not row.done for row in rows):
            self.coming = self._begin(tokens)
        for row, token, logp in zip(rows, np.array(tokens).tolist(), np.array(logps).tolist(), strict=True):
            row.tokens.append(token)
            row.logps.append(logp)

    def _begin(self, last: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Tokens and log-probs of a step that the device has begun. last: int32 [B], tokens that no row knows yet."""
        board, unread = self.board, int(last is not None)
        board.begin()
        for cache in self.caches:
            cache.reserve()
        self.before = self.seen, [cache.notes for cache in self.caches]
        if last is None:
            last = mx.array([row.tokens[-1] if row.tokens else int(row.prompt[-1]) for row in board.rows], mx.int32)
        places = [min(len(row.tokens) + unread, len(row.uniform) - 1) for row in board.rows]
        uniform = np.array([row.uniform[place] for row, place in zip(board.rows, places, strict=True)], np.float32)
        fed = last, mx.array(uniform)
        found = self._compiled(*fed) if self.compiled and board.asked else self._next(*fed)
        mx.async_eval(found, self.seen, [(cache.own, cache.notes) for cache in self.caches])
        board.column += 1
        board.held = board.held + 1
        return found

    def _undo(self) -> None:
        """Forget a step whose tokens no row knows: rows come and go, and the others take it again."""
        if self.coming:
            self.coming, (self.seen, notes) = None, self.before
            for cache, kept in zip(self.caches, notes, strict=True):
                cache.notes = kept
            self.board.column -= 1
            self.board.held = self.board.held - 1

    def _next(self, last: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
        hidden = self.policy.body.hidden(last[:, None], self.caches)
        tokens, logps = pick(self.policy.body.logits(hidden[:, 0]), uniform, self.sampling, self.seen)
        if self.seen is not None:
            self.seen = mx.put_along_axis(self.seen, tokens[:, None], mx.array(True), 1)
        return tokens, logps

    def _compiled(self, last: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
        """As `_next`, one trace for as long as rows and room stay the same: what changes from step to step is data."""
        board, columns = self.board, self.caches[0].own[0].shape[2]
        windows = sorted(self.board.asked, key=str)
        masks = [mx.array(board.sees(window, columns)[:, None, None]) for window in windows]
        kept = [(cache.prompt, cache.own, cache.notes) for cache in self.caches]
        where = board.offset, board.last_prompt, board.variant
        arrays = (last, uniform, self.seen, mx.array([board.column]), where, masks, kept, board.groups[:3])
        tokens, logps, self.seen, made = self.compiled(arrays)  # type: ignore[misc]
        for cache, (prompt, _, _), (own, notes) in zip(self.caches, kept, made, strict=True):
            cache.prompt, cache.own, cache.notes = prompt, tuple(own), notes
        return tokens, logps

    def _compute(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is compiled: the board and the caches hold its arguments while it is traced."""
        last, uniform, seen, at, where, masks, kept, groups = arrays
        board, before = self.board, self.board.groups
        was = board.offset, board.last_prompt, board.variant
        windows = sorted(self.board.asked, key=str)
        self.seen, board.at = seen, at
        board.offset, board.last_prompt, board.variant = where
        board.masks, board.groups = (
            dict(zip(windows, masks, strict=True)),
            before._replace(row_prompt=groups[0], members=groups[1], place=groups[2]),
        )
        for cache, (prompt, own, notes) in zip(self.caches, kept, strict=True):
            cache.prompt, cache.own, cache.notes = tuple(prompt), tuple(own), dict(notes)
        tokens, logps = self._next(last, uniform)
        found = tokens, logps, self.seen, [(list(cache.own), cache.notes) for cache in self.caches]
        board.at, board.groups = None, before
        board.offset, board.last_prompt, board.variant = was
        return found

    def _prefill(self, rows: list[Row], width: int) -> tuple[list[list[mx.array]], list[dict[str, mx.array]]]:
        """Per layer keys and values [P, Hkv, width, D] and notes [P, ...] of prompts without their last tokens."""
        at_once, even = max(1, PREFILL_TOKENS // width), self.policy.even or self.policy.exact
        ordered = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) if even else i)
        parts, notes = [], []
        for some in _cut([rows[i] for i in ordered], at_once, even):
            columns = max(len(some[0].prompt) - 1, 1) if even else width
            tokens, pad = np.zeros((len(some), columns), np.int32), np.zeros(len(some), np.int32)
            for i, row in enumerate(some):
                pad[i] = columns - (len(row.prompt) - 1)
                tokens[i, pad[i] :] = row.prompt[:-1]
            variant = mx.array([row.variant for row in some], mx.int32)
            # Of even prompts only one without any column is padded, by one whose position must not be below 0 either.
            recorders = record(self.policy.model, None if even else mx.array(pad), columns, variant)
            self.policy.body.hidden(mx.array(tokens), recorders)
            wider = [(0, 0), (0, 0), (width - columns, 0), (0, 0)]
            parts.append([[mx.pad(x, wider) for x in recorder.kv] for recorder in recorders])
            notes.append([recorder.notes for recorder in recorders])
            mx.eval(parts[-1], notes[-1])
        back = mx.array(np.argsort(ordered))
        layers = range(len(self.caches))
        joined = [{k: mx.concatenate([part[i][k] for part in notes])[back] for k in notes[0][i]} for i in layers]
        return [[mx.concatenate([part[i][j] for part in parts])[back] for j in range(2)] for i in layers], joined

    def _own(self, cache: GroupCache, rows: mx.array, column: int, new: int) -> tuple[mx.array, ...]:
        """Own keys and values of the rows that stay, their newest token at the same column, and room for new ones."""
        start = self.board.column - column
        kept = [x[rows][:, :, start : self.board.column] for x in cache.own]
        wider = -column % COLUMNS or COLUMNS
        return tuple(mx.pad(x, [(0, new), (0, 0), (0, wider), (0, 0)]) for x in kept)


def had(rows: Sequence[Row], vocabulary: int) -> mx.array:
    """bool [B, V]: the tokens of each row and its prompt."""
    found = np.zeros((len(rows), vocabulary), bool)
    for one, row in zip(found, rows, strict=True):
        one[np.concatenate([row.prompt, np.array(row.tokens, np.int32)])] = True
    return mx.array(found)


def _cut(rows: list[Row], at_once: int, even: bool) -> Iterator[list[Row]]:
    """At most so many rows together; even: and of one length (they come by length)."""
    for _, alike in groupby(rows, key=lambda row: len(row.prompt) if even else 0):
        some = list(alike)
        yield from (some[start : start + at_once] for start in range(0, len(some), at_once))


def _joined(old: dict[str, mx.array], stay: mx.array, made: dict[str, mx.array], came: mx.array) -> dict[str, mx.array]:
    """Notes [B, ...] of the rows that stay and, from their prompts' notes, of those that come."""
    parts = [part for part in ({k: x[stay] for k, x in old.items()}, {k: x[came] for k, x in made.items()}) if part]
    return {name: mx.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def lends(policy: Policy) -> bool:
    """Whether some layers have no keys and values of their own."""
    return len(layers_of(policy.model)) > len(windows(policy.model))
