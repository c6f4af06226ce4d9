# SPDX-License-Identifier: Apache-2.0
"""Losses against numbers derived elsewhere: formulas in float64 NumPy, and gradients by finite differences."""

import math
from typing import Literal

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import losses
from mlx_realign.batch import Batch, Scores
from mlx_realign.losses import Pair
from mlx_realign.methods import dpo, sft

# Two pairs and what NumPy's float64 makes of the papers' formulas at beta 0.1.
CHOSEN, REJECTED = [-12.0, -30.0], [-14.0, -28.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -29.0], [-13.5, -29.5]
SIGMOID = [0.6209570477895321, 0.8259394198788436]
SMOOTHED = [0.6359570477895321, 0.8009394198788436]  # label_smoothing 0.1
SLOPES = [-0.023128507732812525, -0.028108825044289906]  # of the mean with respect to the chosen log-probs


def pair(dtype: mx.Dtype = mx.float32) -> Pair:
    numbers = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, [6, 10], [7, 8])
    return Pair(*(mx.array(np.array(x, np.float64), dtype=dtype) for x in numbers))


def make_batch(mask: list[list[int]], row_prompt: list[int], row: list[int], **extras: list[float]) -> Batch:
    """A batch as far as losses look at it: they see masks and extras, never a token."""
    prompts = max(row_prompt) + 1
    flags = np.array(mask, bool)
    zeros = mx.zeros(flags.shape, mx.int32)
    return Batch(
        prompt=mx.zeros((prompts, 2), mx.int32),
        prompt_pad=mx.zeros((prompts,), mx.int32),
        completion=zeros,
        row_prompt=mx.array(row_prompt),
        mask=mx.array(flags),
        positions=mx.array(np.flatnonzero(flags).astype(np.int32)),
        extras={"row": mx.array(row), **{k: mx.array(v) for k, v in extras.items()}},
    )


def make_scores(batch: Batch, seed: int = 0) -> Scores:
    """Log-probs between -3 and 0, entropies and hits, zero where the mask is False."""
    rng = np.random.default_rng(seed)
    keep = np.array(batch.mask)
    logps, entropy = -3 * rng.random(keep.shape), 2 * rng.random(keep.shape)
    hits = rng.integers(0, 2, keep.shape)
    return Scores(*(mx.array((x * keep).astype(np.float32)) for x in (logps, entropy, hits)))


def test_sigmoid_has_the_values_and_slopes_of_the_formula():
    values = losses.sigmoid(pair(), beta=0.1)
    np.testing.assert_allclose(values, SIGMOID, rtol=1e-6)
    slopes = mx.grad(lambda c: losses.sigmoid(pair()._replace(chosen=c), beta=0.1).mean())(mx.array(CHOSEN))
    np.testing.assert_allclose(slopes, SLOPES, rtol=1e-6)


def test_label_smoothing_is_conservative_dpo():
    np.testing.assert_allclose(losses.sigmoid(pair(), beta=0.1, label_smoothing=0.1), SMOOTHED, rtol=1e-6)
    flipped = pair()
    flipped = Pair(*(flipped[i] for i in (1, 0, 3, 2, 5, 4)))
    half = losses.sigmoid(pair(), beta=0.1, label_smoothing=0.5)
    np.testing.assert_allclose(half, losses.sigmoid(flipped, beta=0.1, label_smoothing=0.5), rtol=1e-6)


def test_at_the_reference_the_loss_is_ln_2():
    at_reference = pair()._replace(chosen=mx.array(REF_CHOSEN), rejected=mx.array(REF_REJECTED))
    for smoothing in (0.0, 0.3):
        values = losses.sigmoid(at_reference, beta=0.7, label_smoothing=smoothing)
        assert np.abs(np.array(values) - math.log(2)).max() <= 3e-7


def test_sigmoid_stays_finite_far_out():
    far = Pair(*(mx.array(x) for x in ([-9000.0, 0.0], [0.0, -9000.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0], [9.0, 9.0])))
    np.testing.assert_allclose(losses.sigmoid(far, beta=1.0), [9000.0, 0.0], rtol=1e-6)
    slope = mx.grad(lambda c: losses.sigmoid(far._replace(chosen=c), beta=1.0).sum())(far.chosen)
    np.testing.assert_allclose(slope, [-1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_slopes_of_sigmoid_are_those_of_finite_differences(smoothing: float):
    """Five-point differences: with steps of 0.5 nats rounding costs 4e-6 and the rule itself less."""

    def total(*sides: mx.array) -> mx.array:
        own = pair()._replace(chosen=sides[0], rejected=sides[1])
        return losses.sigmoid(own, beta=0.1, label_smoothing=smoothing).sum()

    at = (pair().chosen, pair().rejected)
    for which, slope in enumerate(mx.grad(total, argnums=(0, 1))(*at)):
        for i in range(2):
            step = mx.array(np.eye(2, dtype=np.float32)[i] * 0.5)
            near = lambda n: total(*(x + n * step if k == which else x for k, x in enumerate(at))).item()  # noqa: B023, E731
            difference = (8 * (near(1) - near(-1)) - (near(2) - near(-2))) / (12 * 0.5)
            assert slope[i].item() == pytest.approx(difference, rel=3e-5)


def test_nll_and_dft_per_token():
    logps = mx.array([-0.1, -1.0, -5.0])
    np.testing.assert_allclose(losses.nll(logps), [0.1, 1.0, 5.0])
    # p * -log p, and the slope is -p: no gradient flows through the weight
    np.testing.assert_allclose(losses.dft(logps), [0.09048374180359596, 0.36787944117144233, 0.0336897349954273], 1e-6)
    slope = mx.grad(lambda x: losses.dft(x).sum())(logps)
    np.testing.assert_allclose(slope, [-0.9048374180359595, -0.36787944117144233, -0.006737946999085467], rtol=1e-6)


def test_pairs_sum_over_trained_tokens_only():
    batch = make_batch([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [0, 0, 1, 1], [0, 1, 0, 1])
    scores = make_scores(batch)
    found = losses.pairs(scores, batch)
    totals = np.array(scores.logps, np.float64).sum(-1)
    np.testing.assert_allclose(found.chosen, totals[[0, 2]], rtol=1e-6)
    np.testing.assert_allclose(found.rejected, totals[[1, 3]], rtol=1e-6)
    assert found.chosen_length.tolist() == [3, 1]
    assert found.rejected_length.tolist() == [1, 4]
    assert found.ref_chosen.tolist() == found.ref_rejected.tolist() == [0, 0]


def test_several_rejected_make_a_pair_each_with_the_chosen_of_their_prompt():
    """Prompt 0 has rejected 1, 2 and 3; prompt 1 has one; in prompt 2 the chosen row is not even the first."""
    row_prompt, row = [0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 0, 1, 1, 0, 2]
    batch = make_batch([[1]] * 9, row_prompt, row, ref_logps=[float(-i) for i in range(9)])
    scores = Scores(mx.array([[-10.0 * i] for i in range(9)]), mx.zeros((9, 1)), mx.zeros((9, 1)))
    found = losses.pairs(scores, batch)
    expected = [(0, 1), (0, 2), (0, 3), (4, 5), (7, 6), (7, 8)]
    np.testing.assert_array_equal(np.stack([found.chosen, found.rejected], 1) / -10, expected)
    np.testing.assert_array_equal(-np.stack([found.ref_chosen, found.ref_rejected], 1), expected)
    out = dpo.loss(scores, batch, dpo.Config(beta=0.1))
    margins = np.array([0.1 * ((-9 * c) - (-9 * r)) for c, r in expected])
    assert out.count.item() == 6
    assert out.total.item() == pytest.approx(np.log1p(np.exp(-margins)).sum(), rel=1e-6)


def test_dpo_and_its_metrics():
    """Log-probs of one token a row, so that the two pairs of above come out; metrics derived by hand."""
    logps = [CHOSEN[0], REJECTED[0], CHOSEN[1], REJECTED[1]]
    refs = [REF_CHOSEN[0], REF_REJECTED[0], REF_CHOSEN[1], REF_REJECTED[1]]
    batch = make_batch([[1]] * 4, [0, 0, 1, 1], [0, 1, 0, 1], ref_logps=refs)
    scores = Scores(*(mx.array(x)[:, None] for x in (logps, [1.0, 9.0, 3.0, 9.0], [1.0, 1.0, 0.0, 1.0])))
    out = dpo.loss(scores, batch, dpo.Config())
    assert out.total.item() == pytest.approx(sum(SIGMOID), rel=1e-6)
    assert out.count.item() == 2
    means = {name: (total / count).item() for name, (total, count) in out.metrics.items()}
    assert means == pytest.approx(
        {
            "rewards/chosen": 0.0,
            "rewards/rejected": 0.05,
            "rewards/margins": -0.05,
            "rewards/accuracies": 0.5,
            "logps/chosen": -21.0,
            "logps/rejected": -21.0,
            "entropy": 2.0,  # over the chosen rows
            "mean_token_accuracy": 0.5,
        },
        abs=1e-6,
    )
    smoothed = dpo.loss(scores, batch, dpo.Config(label_smoothing=0.1))
    assert smoothed.total.item() == pytest.approx(sum(SMOOTHED), rel=1e-6)


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_sft_sums_over_trained_tokens_and_nothing_else(kind: Literal["nll", "dft"]):
    batch = make_batch([[0, 1, 1], [1, 0, 0], [0, 0, 0]], [0, 1, 2], [0, 0, 0])
    scores = make_scores(batch)
    noise = mx.where(batch.mask, 0.0, -7.0)  # what stands at untrained positions must not matter
    out = sft.loss(scores._replace(logps=scores.logps + noise), batch, sft.Config(loss_type=kind))
    trained = np.array(scores.logps, np.float64)[np.array(batch.mask)]
    assert out.total.item() == pytest.approx((-trained * (np.exp(trained) if kind == "dft" else 1)).sum(), rel=1e-6)
    assert out.count.item() == 3
    entropy, count = out.metrics["entropy"]
    assert count.item() == 3
    assert entropy.item() == pytest.approx(float(np.array(scores.entropy)[np.array(batch.mask)].sum()), rel=1e-6)


@pytest.mark.parametrize("method", [sft, dpo])
def test_sums_over_parts_are_the_sum_over_the_whole(method):
    """One batch of four prompts against four of one: totals, counts and metrics add up."""
    row_prompt, row = ([0, 1, 2, 3], [0] * 4) if method is sft else ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4)
    mask = np.random.default_rng(3).integers(0, 2, (len(row), 5)).tolist()
    refs = np.linspace(-9, -1, len(row)).tolist()
    batch = make_batch(mask, row_prompt, row, ref_logps=refs)
    scores = make_scores(batch)
    whole = method.loss(scores, batch, method.Config())
    parts = []
    for prompt in range(4):
        own = [i for i, p in enumerate(row_prompt) if p == prompt]
        keep = mx.array(own)
        part = make_batch(
            [mask[i] for i in own], [0] * len(own), [row[i] for i in own], ref_logps=[refs[i] for i in own]
        )
        parts.append(method.loss(Scores(*(x[keep] for x in scores[:3])), part, method.Config()))
    assert whole.total.item() == pytest.approx(sum(p.total.item() for p in parts), rel=1e-6)
    assert whole.count.item() == sum(p.count.item() for p in parts)
    for name, (total, count) in whole.metrics.items():
        assert total.item() == pytest.approx(sum(p.metrics[name][0].item() for p in parts), rel=1e-5, abs=1e-6)
        assert count.item() == sum(p.metrics[name][1].item() for p in parts)
