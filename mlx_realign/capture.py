# SPDX-License-Identifier: Apache-2.0
"""Hidden states of prompts and completions: what each decoder block leaves in the residual stream.

Block -1 is what block 0 reads (the embeddings), block l what block l leaves, before the model's final norm. Texts are
batched by length, what all of them begin with (a template's system message) is computed once, and nothing is computed
after the last block that is asked for. float32 out; means in float64.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import numpy as np

from . import rollout, taps
from .data import encode_prompt
from .errors import UserError
from .policy import Policy
from .prompt_caches import read, record
from .sampling import Sampling
from .workers import stretch

Prompt = str | list[dict[str, Any]]
AT_ONCE = 8192  # tokens computed together
FAR = 1 << 29  # a position no text has
LIKELY = 0.9  # share of the greedy completions that must begin alike


def states(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    positions: Sequence[int] = (-1,),
    blocks: Sequence[int] | None = None,
    at_once: int = AT_ONCE,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of (indices of prompts, states float32 [b, blocks, positions, D]).

    positions: counted from a prompt's end, -1 its last token. blocks: default -1 and all. Raises UserError where a
    prompt has fewer tokens than the positions need, or a block is not there.
    """
    if bad := [p for p in positions if p >= 0]:
        raise UserError(f"position {bad[0]}: positions count from the prompt's end, -1 is its last token")
    if not len(prompts):
        raise UserError("there are no prompts to read states from")
    short = next((i for i, prompt in enumerate(prompts) if len(prompt) < -min(positions)), None)
    if short is not None:
        raise UserError(f"prompt {short + 1} has {len(prompts[short])} tokens, too few for position {min(positions)}")
    picks = [[[len(prompt) + p] for p in positions] for prompt in prompts]
    yield from _batches(policy, prompts, picks, [len(prompt) - 1 for prompt in prompts], blocks, at_once)


def collect(policy: Policy, prompts: Sequence[Sequence[int]], **options: Any) -> np.ndarray:
    """As `states`, of all prompts in their order: float32 [n, blocks, positions, D]."""
    return _gather(states(policy, prompts, **options), len(prompts))


def means(policy: Policy, prompts: Sequence[Sequence[int]], **options: Any) -> np.ndarray:
    """Mean over prompts, float64 [blocks, positions, D], batch by batch: for many prompts and positions."""
    total = sum(batch.astype(np.float64).sum(0) for _, batch in states(policy, prompts, **options))
    return np.asarray(total) / len(prompts)


def completion_means(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    blocks: Sequence[int] | None = None,
    at_once: int = AT_ONCE,
) -> np.ndarray:
    """Mean over the tokens of each completion: float32 [n, blocks, D]. UserError for an empty completion."""
    if not len(prompts):
        raise UserError("there are no completions to read states from")
    both = list(zip(prompts, completions, strict=True))
    empty = next((i for i, (_, completion) in enumerate(both) if not len(completion)), None)
    if empty is not None:
        raise UserError(f"completion {empty + 1} is empty: it has no states to average")
    texts = [[*prompt, *completion] for prompt, completion in both]
    picks = [[list(range(len(prompt), len(prompt) + len(completion)))] for prompt, completion in both]
    ends = [len(prompt) - 1 for prompt in prompts]
    return _gather(_batches(policy, texts, picks, ends, blocks, at_once), len(texts))[:, :, 0]


def encode(policy: Policy, prompts: Sequence[Prompt], *, prefix: Sequence[int] = ()) -> list[list[int]]:
    """Token ids of user messages (or lists of messages) up to where a completion begins, then those of `prefix`."""
    return [[*encode_prompt(prompt, policy.tokenizer), *prefix] for prompt in prompts]


def response_prefix(policy: Policy, *sets: Sequence[Prompt], sample: int = 50, max_new_tokens: int = 16) -> list[int]:
    """Tokens that the model's greedy completions begin with whatever the prompt, often none.

    At least nine tenths of a sample of each set of prompts must agree: what one set alone begins with is the
    behaviour. An opening of reasoning (`<think>`) is closed again by what its template writes for empty reasoning, so
    that positions after it are where answers begin to differ.
    """
    most = max(1, sample // max(1, len(sets)))
    spread = [[one[i * len(one) // min(most, len(one))] for i in range(min(most, len(one)))] for one in sets]
    chosen = encode(policy, [prompt for one in spread for prompt in one])
    made = iter(rollout.rollout(policy, chosen, Sampling(max_new_tokens=max_new_tokens, temperature=0)))
    said = [[next(made)[0] for _ in one] for one in spread]
    begun = [[(one.tokens[:-1] if one.finished else one.tokens).tolist() for one in side] for side in said]
    prefix: list[int] = []
    while sum(map(len, begun)) > 1:
        n = len(prefix)
        sides = [[t[n] for t in side if t[:n] == prefix and len(t) > n] for side in begun]
        every = [token for side in sides for token in side]
        common = max(set(every), key=every.count, default=None)
        if common is None or any(a.count(common) < LIKELY * len(b) for a, b in zip(sides, begun, strict=True)):
            break
        prefix.append(common)
    return _closed(policy, prefix)


def _closed(policy: Policy, prefix: list[int]) -> list[int]:
    opened, closing = getattr(policy.tokenizer, "think_start", None), getattr(policy.tokenizer, "think_end", None)
    text = policy.tokenizer.decode(prefix)
    if not (opened and closing and opened in text and closing not in text):
        return prefix
    return policy.tokenizer.encode(f"{opened}\n\n{closing}\n\n", add_special_tokens=False)


def _gather(batches: Iterator[tuple[list[int], np.ndarray]], count: int) -> np.ndarray:
    whole: np.ndarray | None = None
    for indices, batch in batches:
        whole = np.zeros((count, *batch.shape[1:]), np.float32) if whole is None else whole
        whole[indices] = batch
    assert whole is not None
    return whole


def _batches(
    policy: Policy,
    texts: Sequence[Sequence[int]],
    picks: list[list[list[int]]],
    ends: list[int],
    blocks: Sequence[int] | None,
    at_once: int,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """picks[i][j]: the columns of text i that its j-th state is the mean of; ends: of its last prompt token."""
    policy.reach.refuse(texts, policy.tokenizer, "text")
    paths = taps.blocks(policy.model)
    wanted = list(range(-1, len(paths))) if blocks is None else list(blocks)
    if bad := [b for b in wanted if not -1 <= b < len(paths)]:
        raise UserError(f"block {bad[0]}: the model has blocks 0 to {len(paths) - 1}, and -1 for its embeddings")
    shared = _shared_start(texts, picks) if policy.sharing else 0
    recorders = _record(policy, texts[0][:shared]) if shared else None
    seen: dict[int, mx.array] = {}
    asked: list[mx.array] = [mx.zeros(0)]

    def see(x: mx.array, block: int) -> mx.array:
        seen[block] = _picked(x, asked[0])
        stretch(x)
        return x

    def build(part: list[int]) -> mx.array:
        seen.clear()
        tokens, asked[0] = _arrays([texts[i] for i in part], [picks[i] for i in part], shared)
        caches = read(recorders, mx.zeros(len(part), mx.int32), shared) if recorders else None
        last = mx.array([ends[i] for i in part], mx.int32)  # for taps that act on some positions only
        for cache in caches or []:
            cache.last_prompt = last
        with taps.tell(last_prompt=last):
            policy.body.hidden(tokens, caches)
        return mx.stack([seen[block] for block in wanted], 1)

    workers = policy.workers.count
    with ExitStack() as stack:
        for block in wanted:
            handle = taps.put(policy.model, paths[max(block, 0)], lambda x, _, b=block: see(x, b), before=block < 0)
            stack.callback(handle.remove)
        for batch in _cut([len(text) - shared for text in texts], at_once * workers):
            parts = [part for part in (batch[i::workers] for i in range(workers)) if part]
            yield (
                [i for part in parts for i in part],
                np.concatenate([np.array(x) for x in policy.workers.each(parts, build)]),
            )


def _picked(x: mx.array, asked: mx.array) -> mx.array:
    """float32 [b, picks, D] of x [b, T, D]; asked: columns int32 [b, picks], or weights float32 [b, picks, T]."""
    if asked.ndim == 2:
        return mx.take_along_axis(x, asked[..., None], 1).astype(mx.float32)
    return asked @ x.astype(mx.float32)


def _arrays(texts: list[Sequence[int]], picks: list[list[list[int]]], shared: int) -> tuple[mx.array, mx.array]:
    """Tokens int32 [b, T] after the shared start, padded on the right, and what `_picked` is asked for."""
    width = max(len(text) for text in texts) - shared
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text) - shared] = text[shared:]
    if all(len(columns) == 1 for pick in picks for columns in pick):
        return mx.array(tokens), mx.array(np.array([[c[0] for c in pick] for pick in picks], np.int32) - shared)
    weights = np.zeros((len(texts), len(picks[0]), width), np.float32)
    for i, pick in enumerate(picks):
        for j, columns in enumerate(pick):
            weights[i, j, np.array(columns) - shared] = 1 / len(columns)
    return mx.array(tokens), mx.array(weights)


def _shared_start(texts: Sequence[Sequence[int]], picks: list[list[list[int]]]) -> int:
    """How many tokens all texts begin with; none of them is picked, and each text goes on after them."""
    return min(common_start(texts), min(min(columns) for pick in picks for columns in pick))


def common_start(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts (token ids, at least one text) begin with."""
    first, last = min(map(tuple, texts)), max(map(tuple, texts))  # in dictionary order: what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _record(policy: Policy, start: Sequence[int]) -> list[Any]:
    recorders = record(policy.model, None, len(start))
    for recorder in recorders:
        recorder.last_prompt = mx.array([FAR])  # it is none of these
    policy.body.hidden(mx.array([list(start)]), recorders)
    mx.eval([recorder.kv for recorder in recorders])
    return recorders


def _cut(lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Indices in batches of like length, at most `at_once` tokens each with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first: memory is asked for once
        if batch and (len(batch) + 1) * lengths[batch[0]] > at_once:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
