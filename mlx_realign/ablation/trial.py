# SPDX-License-Identifier: Apache-2.0
"""Several ablated models in one forward pass: the weights stay as they are, and each row says what its writers lose.

A tap on every writer gives y - w (y . r) r, with w and r of the row's slot; a bias keeps its part, as it does under an
adapter. What all prompts begin with (a template's system message) is computed once for each slot. Rows of several
trials are decoded together, and leave as soon as their verdict is known.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import data, taps
from ..adapter_layers import SWITCH
from ..capture import common_start
from ..decoding import Decoder, Row
from ..distributions import log_probs
from ..policy import Policy
from ..prompt_caches import PromptReader, PromptRecorder, record
from ..rollout import rollout
from ..sampling import Sampling
from ..ways import shares
from ..writers import Writer, module_at
from .edit import Edit

AT_ONCE, ENOUGH = 8192, 256  # tokens computed together: at most, and for matmuls to be fast
LOGITS = 1 << 25  # entries of log-probs made at a time
LEAVE = 8  # rows go when at least one in so many is done: each time the keys and values of the others are copied


class Forced(NamedTuple):
    """A text given to the model, and from which column on its predictions are wanted."""

    tokens: Sequence[int]
    first: int  # the column whose prediction is the first one wanted


def path_of_experts(path: str) -> str:
    """Of the module that sums up what experts give, from the path of a layer in one: `ffn` of `ffn.experts.3.w2`."""
    parts = path.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last - 1])


class Slots:
    """What the policy's writers lose, by slot: 0 nothing, 1 to `count` what `set` says. The context's end takes it off.

    Only rows that ask for a slot are touched; the policy itself answers as ever.
    """

    def __init__(self, policy: Policy, writers: Sequence[Writer], count: int, width: int) -> None:
        """width: of the residual stream."""
        self.policy, self.count, self.width = policy, count, width
        self.index = {writer.path: i for i, writer in enumerate(writers)}
        self.unit = np.zeros((len(writers), count + 1, width), np.float32)
        self.gone = np.zeros_like(self.unit)  # weight times unit
        self.bias = [_bias(policy, writer) for writer in writers]
        self.holder = taps.hold(policy.model, {})
        self.starts: dict[tuple[int, tuple[int, ...]], list[PromptRecorder]] = {}
        self.stack = ExitStack()
        self.stack.callback(taps.release, policy.model, self.holder)
        summed: set[str] = set()
        for i, writer in enumerate(writers):
            # Experts give [B, T, chosen, d] after they are in the tokens' order again, which is one level up.
            path = writer.path
            if isinstance(module_at(policy.model, path), SWITCH):
                path = path.rpartition(".")[0]
            elif writer.kind == "experts":  # a module for each: behind their sum, which one tap is enough for
                path = path_of_experts(path)
                if path in summed:
                    continue
                summed.add(path)
            self.stack.callback(taps.put(policy.model, path, self._tap(i)).remove)
        self._write()

    def __enter__(self) -> "Slots":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def set(self, slot: int, edits: Sequence[Edit]) -> None:
        """What writers lose in a slot from now on; those that no edit names keep what they write.

        ValueError for an edit of several directions: a trial removes one.
        """
        self.unit[:, slot] = self.gone[:, slot] = 0
        for edit in edits:
            if len(edit.directions) > 1:
                raise ValueError(f"{edit.writer.path}: a trial removes one direction, not {len(edit.directions)}")
            for unit in edit.directions:
                i = self.index[edit.writer.path]
                self.unit[i, slot], self.gone[i, slot] = unit, edit.weight * unit
        self.starts = {key: made for key, made in self.starts.items() if key[0] != slot}
        self._write()

    def _write(self) -> None:
        for i, bias in enumerate(self.bias):
            self.holder[f"unit{i}"], self.holder[f"gone{i}"] = mx.array(self.unit[i]), mx.array(self.gone[i])
            if bias is not None:
                self.holder[f"kept{i}"] = mx.array(self.unit[i] @ bias)
        mx.eval(self.holder.parameters())

    def _tap(self, i: int) -> taps.Tap:
        def tap(y: mx.array, place: taps.Place) -> mx.array:
            slot = place.variant()
            if slot is None:
                return y
            unit, gone = self.holder[f"unit{i}"][slot], self.holder[f"gone{i}"][slot]
            rows = y.reshape(slot.size, -1, self.width)
            part = rows.astype(mx.float32) @ unit[..., None]
            if self.bias[i] is not None:
                part = part - self.holder[f"kept{i}"][slot][:, None, None]
            return (rows - (part * gone[:, None]).astype(y.dtype)).reshape(y.shape)

        return tap

    # ------------------------------------------------------------------ given texts

    def logps(self, slot: int, texts: Sequence[Forced]) -> Iterator[mx.array]:
        """Log-probs float32 [n, V] of a slot's model at the wanted columns, text after text; n as in any slot."""
        states = self.states(slot, texts)
        size = max(1, LOGITS // self.policy.vocabulary)
        for start in range(0, states.shape[0], size):
            yield log_probs(self.policy.body.logits(states[start : start + size]))

    def states(self, slot: int, texts: Sequence[Forced]) -> mx.array:
        """Final hidden states [all wanted columns, D] of a slot's model, in the order of the texts."""
        begun = self._begun([text.tokens for text in texts], min(text.first for text in texts))
        variant = mx.array([slot], mx.int32)

        def build(part: list[int]) -> mx.array:
            width = max(len(texts[i].tokens) for i in part) - len(begun)
            tokens = np.zeros((len(part), width), np.int32)
            wanted = []
            for row, i in enumerate(part):
                own = texts[i].tokens[len(begun) :]
                tokens[row, : len(own)] = own
                wanted += [row * width + column for column in range(texts[i].first - len(begun), len(own))]
            caches = _readers(PromptReader, self._start(slot, begun), [0] * len(part)) if begun else None
            with taps.tell(variant=variant):
                hidden = self.policy.body.hidden(mx.array(tokens), caches)
            return hidden.reshape(-1, hidden.shape[-1])[mx.array(wanted)]

        self._start(slot, begun)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
        found: dict[int, mx.array] = {}
        for parts in _batches([len(texts[i].tokens) - len(begun) for i in order], self.policy.workers.count):
            mine = [[order[i] for i in part] for part in parts]
            for part, states in zip(mine, self.policy.workers.each(mine, build), strict=True):
                ends = np.cumsum([len(texts[i].tokens) - texts[i].first for i in part])
                found |= dict(zip(part, mx.split(states, ends[:-1].tolist()), strict=True))
        return mx.concatenate([found[i] for i in range(len(texts))])

    def _begun(self, texts: Sequence[Sequence[int]], most: int) -> tuple[int, ...]:
        """What all texts begin with, at most so many tokens; nothing where this model cannot share it."""
        return tuple(texts[0][: min(common_start(texts), most)]) if shares(self.policy) else ()

    def _start(self, slot: int, begun: tuple[int, ...]) -> list[PromptRecorder]:
        """Keys and values of a start in a slot's model, computed once."""
        if begun and (slot, begun) not in self.starts:
            made = record(self.policy.model, None, len(begun), mx.array([slot], mx.int32))
            self.policy.body.hidden(mx.array([begun]), made)
            mx.eval([recorder.kv for recorder in made])
            self.starts[slot, begun] = made
        return self.starts.get((slot, begun), [])


class Job(NamedTuple):
    """A completion to be made: the row of one prompt of one scorer in one trial."""

    trial: int
    scorer: int
    prompt: int  # its place among the prompts of that scorer


class Runner:
    """Decodes rows of several trials together, greedily; who is done makes room for who waits."""

    def __init__(self, slots: Slots, prompts: Sequence[Sequence[int]], rows: int) -> None:
        """prompts: all that will come, so that what they begin with is known; rows: at most so many at a time."""
        self.slots, self.policy, self.most = slots, slots.policy, rows
        self.begun = slots._begun(prompts, min(len(prompt) for prompt in prompts) - 2)
        self.decoder = _Rows(slots, self.begun)
        self.waiting: deque[Row] = deque()
        self.ends = set(self.policy.tokenizer.eos_token_ids) | data.stop_ids(self.policy.tokenizer)
        self.count = self.tokens = 0  # rows ever begun, tokens ever generated

    @property
    def live(self) -> list[Row]:
        """Rows that are being made."""
        return [row for row in self.decoder.rows if not row.done]

    @property
    def hungry(self) -> bool:
        """Whether there is room for more rows than are waiting."""
        return not self.waiting and (self.most - len(self.live)) * LEAVE >= self.most

    def add(self, job: Job, slot: int, prompt: Sequence[int]) -> None:
        """Let a row wait for its place."""
        self.waiting.append(Row(np.array(prompt, np.int32), self.count, np.zeros(1, np.float32), job, slot))
        self.count += 1

    def drop(self, trial: int) -> None:
        """A trial's rows leave."""
        self.waiting = deque(row for row in self.waiting if row.tag.trial != trial)
        for row in self.live:
            row.done = row.tag.trial == trial

    def step(self) -> list[tuple[Row, str, bool]]:
        """One more token for every row: (row, text so far, whether it ended by itself). The caller says who is done."""
        live = self.live
        room, gone = self.most - len(live), len(self.decoder.rows) - len(live)
        if not live or gone * LEAVE >= len(self.decoder.rows) or (self.waiting and room * LEAVE >= self.most):
            new = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
            if gone or new:
                self.decoder.exchange(live, new)
        if not self.decoder.rows:
            return []
        self.decoder.step()
        told = []
        for row in self.live:
            self.tokens += 1
            ended = row.tokens[-1] in self.ends
            text: str = self.policy.tokenizer.decode(row.tokens[:-1] if ended else row.tokens)
            told.append((row, text, ended))
        return told


def completions(slots: Slots, slot: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Tokens of the greedy completions of a slot's model, without an end token; on any model."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)
    variants = [slot] * len(prompts)
    made = rollout(slots.policy, [list(prompt) for prompt in prompts], sampling, variants=variants)
    return [one.tokens[: len(one.tokens) - one.finished].tolist() for [one] in made]


class _Rows(Decoder):
    """A decoder whose new rows take what their prompts begin with from their slot."""

    def __init__(self, slots: Slots, begun: tuple[int, ...]) -> None:
        super().__init__(slots.policy, Sampling(temperature=0), grouped=bool(slots.policy.groups_rows))
        self.slots, self.begun = slots, begun

    def _prefill(self, rows: list[Row], width: int) -> tuple[list[list[mx.array]], list[dict[str, mx.array]]]:
        if not self.begun:
            return super()._prefill(rows, width)
        begun = len(self.begun)
        slots = sorted({row.variant for row in rows})
        each = [self.slots._start(slot, self.begun) for slot in slots]
        starts = [_joined(layer) for layer in zip(*each, strict=True)]
        mx.eval([(start.kv, start.variant, start.notes) for start in starts])  # workers cannot finish what others began

        def build(part: list[int]) -> tuple[list[mx.array], list[dict[str, mx.array]]]:
            own = [rows[i].prompt[begun:-1] for i in part]
            tokens = np.zeros((len(part), max(map(len, own))), np.int32)
            for row, rest in zip(tokens, own, strict=True):
                row[: len(rest)] = rest
            readers = _readers(_Kept, starts, [slots.index(rows[i].variant) for i in part])
            self.policy.body.hidden(mx.array(tokens), readers)
            filled = np.array([begun + len(rest) for rest in own])
            aligned = [_right_aligned(x, filled, width) for reader in readers for x in reader.whole]
            return aligned, [reader.notes for reader in readers]

        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        found: list[tuple[list[mx.array], list[dict[str, mx.array]]]] = []
        places: list[int] = []
        for parts in _batches([len(rows[i].prompt) - begun for i in order], self.policy.workers.count):
            mine = [[order[i] for i in part] for part in parts]
            found += self.policy.workers.each(mine, build)
            places += [i for part in mine for i in part]
        back = mx.array(np.argsort(places).astype(np.int32))
        flat = [mx.concatenate([kv[i] for kv, _ in found])[back] for i in range(2 * len(starts))]
        notes = [_concatenated([notes[i] for _, notes in found], back) for i in range(len(starts))]
        return [flat[i : i + 2] for i in range(0, len(flat), 2)], notes

    def _next(self, last: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
        """Without log-probs: nobody asks for them."""
        hidden = self.policy.body.hidden(last[:, None], self.caches)
        tokens = mx.argmax(self.policy.body.logits(hidden[:, 0]), -1).astype(mx.int32)
        return tokens, mx.zeros(tokens.shape)


def _bias(policy: Policy, writer: Writer) -> np.ndarray | None:
    """float32 [d]; of experts None: theirs are ablated too, since they cannot be told apart behind their sum."""
    layer = module_at(policy.model, writer.path)
    return np.array(layer.bias.astype(mx.float32)) if "bias" in layer and writer.kind != "experts" else None


class _Kept(PromptReader):
    """Keeps keys and values of the start and of what comes after it."""

    whole: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.whole = super().update_and_fetch(keys, values)
        return self.whole


def _readers(kind: Any, starts: Sequence[PromptRecorder], rows: Sequence[int]) -> list[Any]:
    which = mx.array(list(rows), mx.int32)
    return [kind(start, which) for start in starts]


def _joined(recorders: Sequence[PromptRecorder]) -> PromptRecorder:
    """One layer's recorders of several slots as one of as many prompts."""
    first = recorders[0]
    joined = PromptRecorder(None, first.window)
    joined.last_prompt = first.last_prompt
    joined.kv = tuple(mx.concatenate(list(both)) for both in zip(*(r.kv for r in recorders), strict=True))
    joined.variant = mx.concatenate([r.variant for r in recorders if r.variant is not None])
    joined.notes = _concatenated([r.notes for r in recorders])
    return joined


def _concatenated(notes: Sequence[dict[str, mx.array]], order: mx.array | None = None) -> dict[str, mx.array]:
    """What taps keep of each row, parts one after another, or in another order."""
    joined = {name: mx.concatenate([part[name] for part in notes]) for name in notes[0]}
    return joined if order is None else {name: x[order] for name, x in joined.items()}


def _right_aligned(x: mx.array, filled: np.ndarray, width: int) -> mx.array:
    """[b, H, width, D] of x [b, H, T, D]: the first `filled` columns of each row come last, before them is anything."""
    rows, heads, columns, size = x.shape
    take = np.maximum(np.arange(width)[None] - (width - filled)[:, None], 0) + np.arange(rows)[:, None] * columns
    flat = x.swapaxes(1, 2).reshape(rows * columns, heads, size)[mx.array(take.astype(np.int32))]
    return flat.swapaxes(1, 2)


def _batches(lengths: Sequence[int], workers: int) -> Iterator[list[list[int]]]:
    """Indices of texts, sorted by length already, dealt out to the workers: at most AT_ONCE tokens for each of them.

    A batch also ends where a tenth of it would be padding, once it is large enough to be computed at full speed.
    """
    batch: list[int] = []
    real = 0
    for i, length in enumerate(lengths):
        full = (len(batch) + 1) * length
        if batch and (full > AT_ONCE * workers or (real > ENOUGH * workers and full > 1.1 * (real + length))):
            yield [batch[k::workers] for k in range(workers) if batch[k::workers]]
            batch, real = [], 0
        batch.append(i)
        real += length
    if batch:
        yield [batch[k::workers] for k in range(workers) if batch[k::workers]]
