# SPDX-License-Identifier: Apache-2.0
"""Rows of preferences, and a made-up policy that gives each token a log-prob of its own, by token and place.

Padding, order and the cutting of batches cannot change what it says of a completion.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_realign.batch import Batch, Completion, Example, Scores


def make_examples(format: str) -> list[Example]:
    """Four rows, for pairs with 1, 2, 1 and 3 rejected, one of them of equals; unpaired: one completion each."""
    rng = np.random.default_rng(5)
    examples = []
    for i, (prompt, lengths) in enumerate([(6, [5, 3]), (1, [4, 8, 2]), (3, [7, 9]), (9, [2, 6, 1, 4])]):
        draw = lambda n: rng.integers(3, 300, n).astype(np.int32)  # noqa: E731
        texts = [Completion(draw(n), np.arange(n) != 1 if n > 3 else np.ones(n, bool)) for n in lengths]
        extras: dict[str, Any] = {"scores": [float(9 - k) for k in range(len(lengths))]}
        extras |= {"margin": 0.75} if i == 1 else {"tie": True} if i == 2 else {}
        if format == "unpaired":
            texts, extras = texts[:1], {"label": i % 3 > 0}
        examples.append(Example(draw(prompt), tuple(texts), i + 1, str(i), extras))
    return examples


def said(tokens: mx.array, places: np.ndarray, seed: int, low: float, dtype: mx.Dtype) -> mx.array:
    """A number between low and -0.05 for every token, by what it is and where it stands."""
    wave = np.sin(np.array(tokens) * 12.9898 + places * 78.233 + seed * 37.719) * 43758.5453
    return mx.array(low + (wave % 1) * (-0.05 - low), dtype=dtype)


def scores_of(batch: Batch, dtype: mx.Dtype) -> Scores:
    """What the made-up policy says."""
    places = np.arange(batch.mask.shape[1])
    token = [mx.where(batch.mask, said(batch.completion, places, i, -3.0, dtype), 0) for i in range(3)]
    width = batch.prompt.shape[1]
    before_end = width - np.arange(1, width)
    real = mx.arange(1, width)[None] > batch.pad[:, None]
    prompt = mx.where(real, said(batch.prompt[:, 1:], before_end, 3, -4.0, dtype), 0)
    hits = (token[0] > -0.5).astype(mx.float32) * batch.mask
    return Scores(token[0], -token[1], hits, token[2], prompt)


def rearranged(example: Example, order: Sequence[int]) -> Example:
    """The same row with its completions, and what is said of each, in another order."""
    scores = {k: [v[i] for i in order] for k, v in example.extras.items() if isinstance(v, list)}
    return example._replace(completions=tuple(example.completions[i] for i in order), extras=example.extras | scores)
