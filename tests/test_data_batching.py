# SPDX-License-Identifier: Apache-2.0
"""Which rows go together, and every number of a padded batch."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import data
from mlx_realign.batch import Completion, Example


def sizes_only(prompts, completions, counts=None) -> Any:
    """What `plan` looks at of a dataset."""

    class Lengths(SimpleNamespace):
        def __len__(self):
            return len(self.prompt_lengths)

    as_int = lambda values: np.array(values, np.int32)  # noqa: E731
    counts = np.ones(len(prompts)) if counts is None else counts
    return Lengths(
        prompt_lengths=as_int(prompts), completion_lengths=as_int(completions), num_completions=as_int(counts)
    )


def random_lengths(n: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return sizes_only(rng.integers(1, 200, n), rng.integers(1, 400, n))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 257, 1000])
@pytest.mark.parametrize("batch_tokens", [None, 900])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_is_in_exactly_one_batch(n, batch_tokens, shuffle):
    plan = data.plan(random_lengths(n), batch_size=4, batch_tokens=batch_tokens, seed=1, epoch=2, shuffle=shuffle)
    assert sorted(np.concatenate(plan).tolist()) == list(range(n))
    assert max(map(len, plan)) <= 4
    if batch_tokens is None:
        assert [len(batch) for batch in plan] == [4] * (n // 4) + ([n % 4] if n % 4 else [])


def test_the_plan_depends_on_seed_and_epoch_alone():
    lengths = random_lengths(500)
    plans = [data.plan(lengths, batch_size=4, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    orders = [np.concatenate(plan).tolist() for plan in plans]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("batch_tokens", [None, 900])
def test_every_epoch_has_as_many_batches_in_another_order(batch_tokens):
    """A run counts its steps from the first epoch's plan."""
    lengths = random_lengths(500)
    plans = [data.plan(lengths, batch_size=4, batch_tokens=batch_tokens, seed=0, epoch=e) for e in range(5)]
    assert len({len(plan) for plan in plans}) == 1
    assert len({tuple(np.concatenate(plan).tolist()) for plan in plans}) == 5


def test_without_shuffling_the_order_is_the_files():
    plan = data.plan(random_lengths(10), batch_size=4, seed=0, epoch=3, shuffle=False)
    assert [batch.tolist() for batch in plan] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_rows_of_near_length_go_together():
    """Padding is at most a tenth of what shuffling alone leaves."""
    lengths = random_lengths(4000)
    total = lengths.prompt_lengths + lengths.completion_lengths
    waste = lambda batches: sum(int((total[b].max() - total[b]).sum()) for b in batches)  # noqa: E731
    shuffled = np.random.default_rng(0).permutation(4000).reshape(-1, 8)
    assert waste(data.plan(lengths, batch_size=8, seed=0, epoch=0)) < 0.1 * waste(shuffled)


def test_batches_are_not_sorted_by_length():
    lengths = random_lengths(4000)
    plan = data.plan(lengths, batch_size=8, seed=0, epoch=0)
    means = [float(lengths.completion_lengths[batch].mean()) for batch in plan]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.1


def test_a_batch_holds_at_most_batch_tokens():
    lengths = sizes_only([10, 10, 10, 50, 10], [5, 5, 20, 5, 5], [2, 2, 2, 2, 2])
    plan = data.plan(lengths, batch_size=4, batch_tokens=60, seed=0, epoch=0, shuffle=False)
    # [0, 1]: 2 * 10 + 4 * 5 = 40; with row 2: 3 * 10 + 6 * 20 = 150; row 2 alone 50; row 3 alone 60; row 4.
    assert [batch.tolist() for batch in plan] == [[0, 1], [2], [3], [4]]
    wide = data.plan(
        lengths, batch_size=4, batch_tokens=60, seed=0, epoch=0, shuffle=False, width=lambda n: -(-n // 16) * 16
    )
    assert [batch.tolist() for batch in wide] == [[0], [1], [2], [3], [4]]  # 2 * 16 + 4 * 16 = 96 > 60


def completion(*tokens: int) -> Completion:
    """Negative tokens are trained."""
    return Completion(np.abs(np.array(tokens, np.int32)), np.array(tokens) < 0)


def example(prompt, *completions, **extras) -> Example:
    return Example(np.array(prompt, np.int32), completions, 1, "", extras)


PAIRS = [
    example([1, 2, 3], completion(-4, -5), completion(-6), margin=0.5, scores=[2.0, 1.0]),
    example([7], completion(-8, 9, -8), completion(-9, -9), completion(-4)),
]


def test_a_batch_is_padded_as_written_by_hand():
    batch = data.collate(PAIRS, pad_id=99)
    assert batch.prompt.tolist() == [[1, 2, 3], [99, 99, 7]]
    assert batch.pad.tolist() == [0, 2]
    assert batch.completion.tolist() == [[4, 5, 99], [6, 99, 99], [8, 9, 8], [9, 9, 99], [4, 99, 99]]
    assert batch.row_prompt.tolist() == [0, 0, 1, 1, 1]
    assert batch.mask.astype(mx.int32).tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 3, 6, 8, 9, 10, 12]
    assert batch.extras["row"].tolist() == [0, 1, 0, 1, 2]
    assert [batch.prompt.dtype, batch.completion.dtype, batch.row_prompt.dtype, batch.positions.dtype] == [mx.int32] * 4
    assert batch.mask.dtype == mx.bool_


def test_extras_are_per_prompt_or_per_completion_and_nan_where_missing():
    batch = data.collate(PAIRS)
    assert np.array_equal(np.array(batch.extras["margin"]), [0.5, np.nan], equal_nan=True)
    assert np.array_equal(np.array(batch.extras["scores"]), [2, 1, np.nan, np.nan, np.nan], equal_nan=True)
    labels = data.collate([example([1], completion(-2), label=True), example([1], completion(-2), label=False)])
    assert labels.extras["label"].tolist() == [1.0, 0.0]
    named = data.collate([example([1], completion(-2), source="web")])
    assert set(named.extras) == {"row"}


def test_widths_round_columns_and_positions_up():
    batch = data.collate(PAIRS, width=lambda n: -(-n // 4) * 4)
    assert batch.prompt.shape == (2, 4)
    assert batch.completion.shape == (5, 4)
    assert batch.pad.tolist() == [1, 3]
    assert batch.positions.tolist() == [0, 1, 4, 8, 10, 12, 13, 16]
    nine = data.collate([*PAIRS, example([5], completion(-1))], width=lambda n: -(-n // 4) * 4)
    assert nine.positions.tolist() == [0, 1, 4, 8, 10, 12, 13, 16, 20, 2, 3, 5]


def test_positions_never_repeat_even_when_the_bucket_is_larger_than_the_batch():
    batch = data.collate([example([1], completion(-2, 3))], width=lambda n: -(-n // 32) * 32)
    positions = np.array(batch.positions)
    assert positions[0] == 0
    assert len(set(positions.tolist())) == len(positions) == 32
    tight = data.collate([example([1], completion(-2, 3))], width=lambda n: n if n > 1 else 8)
    assert tight.positions.tolist() == [0, 1]


def test_padding_changes_no_row():
    rng = np.random.default_rng(0)
    rows = [
        example(rng.integers(1, 50, rng.integers(1, 9)), completion(*(rng.integers(1, 50, rng.integers(1, 9)) * -1)))
        for _ in range(20)
    ]
    batch = data.collate(rows, width=lambda n: n + 5)
    prompt, tokens, mask = np.array(batch.prompt), np.array(batch.completion), np.array(batch.mask)
    pads = np.array(batch.prompt_pad)
    for i, row in enumerate(rows):
        assert prompt[i, pads[i] :].tolist() == row.prompt.tolist()
        assert tokens[i][mask[i]].tolist() == row.completions[0].tokens.tolist()
    assert tokens.reshape(-1)[np.array(batch.positions)[: mask.sum()]].tolist() == tokens[mask].tolist()
