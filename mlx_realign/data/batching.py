# SPDX-License-Identifier: Apache-2.0
"""Which rows go together, and how they become one padded batch."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..batch import Batch, Completion, Example, Strip
from .store import Dataset

_POOL_BATCHES = 64  # rows of near length are looked for among this many batches' worth of shuffled rows


def same(n: int) -> int:
    """No rounding."""
    return n


def plan(
    dataset: Dataset,
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    width: Callable[[int], int] = same,
) -> list[np.ndarray]:
    """Row indices (int64) of each micro-batch of one epoch; every row exactly once, the smaller batch last.

    Shuffled: rows are permuted, sorted by length within pools of 64 batches, cut into batches, and the batches
    shuffled; a function of (seed, epoch) alone. Not shuffled: the order of the file. batch_tokens: most padded tokens
    of a batch (prompts and completions, at the widths `width` rounds to); a row larger than that is a batch by itself.
    Every epoch has the same number of batches: with batch_tokens their rows depend on the seed alone, their order on
    the epoch as well.
    """
    n = len(dataset)
    lengths = dataset.prompt_lengths.astype(np.int64) + dataset.completion_lengths
    order = np.arange(n)
    rng = np.random.default_rng([seed, 0 if batch_tokens is not None else epoch])
    if shuffle:
        order = rng.permutation(n)
        pool = np.arange(n) // (batch_size * _POOL_BATCHES)
        order = order[np.lexsort((lengths[order], pool))]
    cuts = list(range(batch_size, n, batch_size))
    if batch_tokens is not None:
        cuts = _cuts(dataset, order, batch_size, batch_tokens, width)
    batches = np.split(order, cuts) if n else []
    if shuffle:
        rng = np.random.default_rng([seed, epoch, 1])
        last = [batches.pop()] if batches and len(batches[-1]) < batch_size and batch_tokens is None else []
        batches = [batches[i] for i in rng.permutation(len(batches))] + last
    return batches


def _cuts(
    dataset: Dataset, order: np.ndarray, batch_size: int, batch_tokens: int, width: Callable[[int], int]
) -> list[int]:
    """Where a new batch must begin: before batch_size or batch_tokens would be exceeded."""
    cuts = []
    rows = completions = prompt = completion = 0
    columns = (dataset.prompt_lengths, dataset.completion_lengths, dataset.num_completions)
    for i, (p, c, r) in enumerate(zip(*(column[order].tolist() for column in columns), strict=True)):
        rows, completions = rows + 1, completions + r
        prompt, completion = max(prompt, p), max(completion, c)
        if rows > 1 and (rows > batch_size or rows * width(prompt) + completions * width(completion) > batch_tokens):
            cuts.append(i)
            rows, completions, prompt, completion = 1, r, p, c
    return cuts


def collate(examples: Sequence[Example], *, width: Callable[[int], int] = same, pad_id: int = 0) -> Batch:
    """Pad examples into one Batch. width(n) >= n rounds the columns and the number of positions up to few shapes.

    extras: "row" int32 [R], index of a completion inside its example; of the examples' own numbers, a number becomes
    float32 [P] and a list with one number per completion float32 [R]; NaN where an example has none.
    """
    prompt = width(max(len(e.prompt) for e in examples))
    completion = width(max((len(c.tokens) for e in examples for c in e.completions), default=1))
    return _collated(examples, prompt, completion, lambda trained: width(max(trained, 1)), pad_id)


def collate_exact(
    examples: Sequence[Example],
    prefix: int,
    widths: Sequence[int] = (),
    *,
    positions: int | None = None,
    planned: bool = True,
    pad_id: int = 0,
) -> Batch:
    """An exact batch: the first `prefix` tokens of each prompt are shared, the rest stands before its completions.

    prefix: below the length of every prompt. widths: of strips, the first for the half of the completions that is
    shorter; one: all are side by side; none: one that fits. positions: how many hidden states go to the head.
    """
    moved = [_behind(example, prefix) for example in examples]
    completions = [c.tokens for e in moved for c in e.completions]
    lengths = np.array([len(tokens) for tokens in completions])
    widths = widths or (int(lengths.max()),)
    batch = _collated(moved, prefix + 1, widths[-1], lambda trained: positions or max(trained, 1), pad_id)
    strips = []
    if len(widths) > 1:
        cut = np.argsort(lengths, kind="stable")
        for rows, columns in zip(halves(cut), widths, strict=True):
            fed = np.full((len(rows), columns), pad_id, np.int32)
            for place, row in zip(fed, rows, strict=True):
                place[: lengths[row]] = [0, *completions[row][:-1]]
            fed[:, 0] = np.array(batch.prompt)[np.array(batch.row_prompt)[rows], -1]
            strips.append(Strip(mx.array(np.sort(rows).astype(np.int32)), mx.array(fed[np.argsort(rows)])))
    lead = mx.array([len(e.prompt) - 1 - prefix for e in examples], mx.int32)
    return batch._replace(prompt_pad=None, lead=lead, strips=tuple(strips), planned=planned)


def halves(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What comes first and the rest, which is one more where it cannot be equal."""
    return order[: len(order) // 2], order[len(order) // 2 :]


def _behind(example: Example, prefix: int) -> Example:
    """With what comes after the prompt's first `prefix` + 1 tokens in front of each completion, not trained."""
    rest = example.prompt[prefix + 1 :]
    no = np.zeros(len(rest), bool)
    completions = tuple(
        Completion(np.concatenate([rest, c.tokens]), np.concatenate([no, c.mask])) for c in example.completions
    )
    return example._replace(prompt=example.prompt[: prefix + 1], completions=completions)


def _collated(
    examples: Sequence[Example], columns: int, wide: int, positions: Callable[[int], int], pad_id: int
) -> Batch:
    """columns of the prompts, columns of the completions, and how many positions there are for so many trained ones."""
    completions = [c for e in examples for c in e.completions]
    prompt = np.full((len(examples), columns), pad_id, np.int32)
    prompt_pad = np.array([columns - len(e.prompt) for e in examples], np.int32)
    for i, example in enumerate(examples):
        prompt[i, prompt_pad[i] :] = example.prompt
    completion, mask = np.full((len(completions), wide), pad_id, np.int32), np.zeros((len(completions), wide), bool)
    for i, (tokens, trained) in enumerate(completions):
        completion[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = trained
    sizes = [len(e.completions) for e in examples]
    extras = {"row": np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]), **_extras(examples)}
    return Batch(
        prompt=mx.array(prompt),
        prompt_pad=mx.array(prompt_pad),
        completion=mx.array(completion),
        row_prompt=mx.array(np.repeat(np.arange(len(examples), dtype=np.int32), sizes)),
        mask=mx.array(mask),
        positions=mx.array(_positions(mask, positions)),
        extras={name: mx.array(values) for name, values in extras.items()},
    )


def _positions(mask: np.ndarray, count: Callable[[int], int]) -> np.ndarray:
    """int32 [N]: flat indices of all trained positions, then of untrained ones up to a bucket."""
    flat = mask.reshape(-1)
    trained = np.flatnonzero(flat)
    spare = max(count(len(trained)) - len(trained), 0)
    # The earliest untrained positions are enough to look through: at most len(trained) of the first are trained.
    untrained = np.flatnonzero(~flat[: len(trained) + spare])[:spare]
    return np.concatenate([trained, untrained]).astype(np.int32)


def _extras(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    out = {}
    for name in sorted({name for e in examples for name in e.extras}):
        values = [e.extras.get(name) for e in examples]
        if all(v is None or isinstance(v, bool | int | float) for v in values):
            out[name] = np.array([np.nan if v is None else v for v in values], np.float32)
        elif all(v is None or _is_numbers(v) for v in values):
            rows = [[np.nan] * len(e.completions) if v is None else v for e, v in zip(examples, values, strict=True)]
            out[name] = np.concatenate([np.array(row, np.float32) for row in rows])
    return out


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int | float) for v in value)
