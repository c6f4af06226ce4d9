# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch side by side in rows of one width, so that next to no token is padding.

Linear layers, norms and the head see the packed rows. Attention takes them apart again, a document to a row, padded on
the right: "causal" then keeps a document from seeing another one and from its padding, without a mask. Positions go on
from document to document, which is right where attention depends on differences of positions alone; a check at load
finds out whether that is so.
"""

import math

import mlx.core as mx
import numpy as np

from .batch import Batch, Pack

CAPACITY = (
    1024  # tokens of a packed row at least, where there are so many; positions beyond lose digits of their angles
)
STEP = 8  # tokens; packed rows are multiples of it


def pack(batch: Batch) -> Batch:
    """The exact batch with its rows packed. Rows end with their last trained token: what follows does not count."""
    mask = np.array(batch.mask)
    count, columns = mask.shape
    lengths = np.where(mask.any(1), columns - np.argmax(mask[:, ::-1], 1), 1)
    bins, width = fitted(lengths)
    tokens = np.zeros((len(bins), width), np.int32)
    documents = np.full((count, columns), tokens.size, np.int32)  # of padding: the row of zeros behind all
    back = np.full(tokens.size, documents.size, np.int32)
    first, completion = np.array(batch.prompt)[np.array(batch.row_prompt), -1], np.array(batch.completion)
    for k, rows in enumerate(bins):
        start = 0
        for row in rows:
            n = int(lengths[row])
            tokens[k, start : start + n] = [first[row], *completion[row, : n - 1]]
            documents[row, :n] = k * width + start + np.arange(n)
            back[k * width + start : k * width + start + n] = row * columns + np.arange(n)
            start += n
    return batch._replace(pack=Pack(mx.array(tokens), mx.array(documents), mx.array(back)))


def fitted(lengths: np.ndarray) -> tuple[list[list[int]], int]:
    """(rows of each packed row, their width), by best-fit decreasing into about as few rows as CAPACITY allows."""
    usual = max(1, round(int(lengths.sum()) / max(CAPACITY, int(lengths.max()))))
    tried = [_fitted(lengths, count) for count in range(max(1, usual - 1), usual + 3)]
    return min(tried, key=lambda found: len(found[0]) * found[1])


def _fitted(lengths: np.ndarray, count: int) -> tuple[list[list[int]], int]:
    """Into at most so many rows, as narrow as that allows."""
    width = max(int(lengths.max()), math.ceil(int(lengths.sum()) / count))
    while True:
        bins: list[list[int]] = []
        room: list[int] = []
        for row in np.argsort(-lengths, kind="stable").tolist():
            n = int(lengths[row])
            fits = [(left, k) for k, left in enumerate(room) if left >= n]
            if fits:
                _, k = min(fits)
                bins[k].append(row)
                room[k] -= n
            else:
                bins.append([row])
                room.append(width - n)
        if len(bins) <= count:
            return bins, _up(max(int(lengths[rows].sum()) for rows in bins))
        width += max(1, width // 64)


def _up(n: int) -> int:
    return -(-n // STEP) * STEP
