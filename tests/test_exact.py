# SPDX-License-Identifier: Apache-2.0
"""Exact batches: no padding before prompts, no masks, the same numbers; and few shapes for a whole run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from policy_tools import make_model, make_policy

from mlx_realign import data, forward, layout, taps
from mlx_realign.batch import Batch, Completion, Example, LossOutput, Scores, taken
from mlx_realign.kernels import banded_attention
from mlx_realign.policy import Policy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import shapes  # noqa: E402  # pyright: ignore[reportMissingImports]

RNG = np.random.default_rng(3)


def example(prompt: int, *lengths: int) -> Example:
    def tokens(n: int) -> np.ndarray:
        return RNG.integers(3, 60, n).astype(np.int32)

    made = []
    for i, n in enumerate(lengths):
        mask = np.ones(n, bool)
        mask[: i % n] = False  # some completions begin untrained
        made.append(Completion(tokens(n), mask))
    return Example(tokens(prompt), tuple(made), 0, "", {})


EXAMPLES = [example(14, 5, 9), example(3, 12, 1, 6), example(1, 4), example(24, 7, 11)]


def exact(example: Example, kept: int, *, strips: bool = True) -> Batch:
    """kept: at most so many tokens of the prompt are shared."""
    prefix = min(kept, len(example.prompt) - 1)
    lengths = sorted(len(example.prompt) - 1 - prefix + len(c.tokens) for c in example.completions)
    widths = (
        (lengths[len(lengths) // 2 - 1] + 1, lengths[-1] + 2) if strips and len(lengths) > 1 else (lengths[-1] + 3,)
    )
    return data.collate_exact([example], prefix, widths, positions=sum(lengths) // 2 + 20)


def weighed(scores: Scores, batch: Batch) -> LossOutput:
    """Each token weighs something else."""
    total = (mx.cos(batch.completion.astype(mx.float32)) * scores.logps).sum()
    return LossOutput(total, mx.array(1.0), {})


def summed(policy: Policy, batches: list[Batch], loss: Callable[..., LossOutput] = weighed) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for batch in batches:
        slopes: Any = tree_flatten(policy.gradients(batch, loss)[1])
        found = {name: value + found.get(name, 0) for name, value in slopes}
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3_text", "gpt_oss", "lfm2", "mamba2", "falcon_h1"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_log_probs_and_gradients_are_those_of_each_row_alone(arch: str, checkpointed: bool):
    policy = make_policy(arch)
    policy.sharing = False
    batch = data.collate(EXAMPLES)
    logps = np.array(policy.scores(batch).logps)
    expected = [
        row[: len(c.tokens)] for row, c in zip(logps, (c for e in EXAMPLES for c in e.completions), strict=True)
    ]
    slopes = summed(policy, [batch])
    policy.sharing, policy.even = policy.shares()
    if checkpointed:
        forward.checkpoint_layers(policy.model)
    for kept, strips in ((99, True), (8, True), (8, False), (0, True)):
        parts = [exact(e, kept, strips=strips) for e in EXAMPLES]
        found = [
            row
            for part, e in zip(parts, EXAMPLES, strict=True)
            for row in taken(part, policy.scores(part).logps, [len(c.tokens) for c in e.completions])
        ]
        assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1e-4
        for name, value in summed(policy, parts).items():
            assert mx.abs(value - slopes[name]).max() <= 1e-4 * mx.abs(slopes[name]).max() + 1e-9, name


def test_what_is_shared_is_shared_with_a_gradient_on_recurrent_layers():
    """Without that of the states the prompt's part of the gradient would be gone."""
    policy = make_policy("mamba2")
    policy.sharing, policy.even = policy.shares()
    assert policy.sharing and policy.even and policy.stateful
    whole = summed(policy, [exact(EXAMPLES[3], 99)])
    keep = forward.read
    try:
        forward.read = lambda recorders, *a: keep([cut(r) for r in recorders], *a)
        cut_off = summed(policy, [exact(EXAMPLES[3], 99)])
    finally:
        forward.read = keep
    assert any(mx.abs(whole[n] - cut_off[n]).max() > 1e-2 * mx.abs(whole[n]).max() for n in whole)


def cut(recorder: Any) -> Any:
    recorder.kv = tuple(mx.stop_gradient(x) for x in recorder.kv)
    return recorder


def test_attention_takes_no_array_where_no_window_bites():
    policy = make_policy("llama")
    policy.kernels.attended.clear()
    policy.states(exact(EXAMPLES[0], 8))
    assert {kind for _, kind in policy.kernels.attended} == {"free"}
    policy.kernels.attended.clear()
    policy.states(data.collate(EXAMPLES))
    assert {kind for _, kind in policy.kernels.attended} == {"array"}
    for window in (8, 4096):
        windowed = make_policy(make_model("mistral", sliding_window=window))
        windowed.kernels.attended.clear()
        windowed.states(exact(EXAMPLES[3], 16))
        assert ("band" in {kind for _, kind in windowed.kernels.attended}) == (window == 8)


def test_prompts_in_two_pieces_have_all_their_log_probs():
    policy = make_policy("llama")
    policy.needs = frozenset({"prompt_logps"})

    def loss(scores: Scores, batch: Batch) -> LossOutput:
        assert scores.prompt_logps is not None
        return LossOutput(scores.prompt_logps.sum(), (batch.prompt_lengths - 1).sum().astype(mx.float32), {})

    batch = data.collate(EXAMPLES)
    expected, parts = policy.losses(batch, loss), [exact(e, 8) for e in EXAMPLES]
    found = [policy.losses(part, loss) for part in parts]
    assert sum(float(one.total) for one in found) == pytest.approx(float(expected.total), rel=1e-5)
    assert sum(float(one.count) for one in found) == float(expected.count) == 13 + 2 + 0 + 23
    slopes = summed(policy, [batch], loss)
    for name, value in summed(policy, parts, loss).items():
        assert mx.abs(value - slopes[name]).max() <= 1e-4 * mx.abs(slopes[name]).max() + 1e-9, name


def test_tokens_weigh_the_same_in_any_cut():
    whole = sum(float(w.sum()) for w in forward.token_weights(data.collate(EXAMPLES), True))
    for kept in (0, 8, 99):
        parts = [w for e in EXAMPLES for w in forward.token_weights(exact(e, kept), True)]
        assert sum(float(w.sum()) for w in parts) == whole


def test_taps_know_positions_and_where_the_prompt_ends():
    policy = make_policy("llama")
    met: list[tuple[list[list[int]], list[int]]] = []

    def tap(x: mx.array, place: taps.Place) -> mx.array:
        last = place.last_prompt()
        assert last is not None
        met.append((np.array(place.positions(x.shape[1])).tolist(), np.array(last).tolist()))
        return x

    handle = taps.put(policy.model, taps.blocks(policy.model)[0], tap)
    policy.states(exact(EXAMPLES[0], 8, strips=False))
    handle.remove()
    (ahead, end), (behind, same_end) = met
    assert ahead == [list(range(8))] and behind[0] == list(range(8, 8 + len(behind[0])))
    assert set(end) == set(same_end) == {13}


# ------------------------------------------------------------------ shapes


def test_shapes_of_short_and_long_rows_are_few():
    """1,750 rows; padding, and prompts computed again, within what such rows allow."""
    limits = {"short": (0.15, 0.25, 0.12), "long": (0.15, 0.25, 0.05)}
    for name, (single, pairs, again) in limits.items():
        for completions, padding in ((1, single), (2, pairs)):
            told = shapes.measured(shapes.rows(name, completions), 4)
            assert told["shapes"] <= layout.CAP
            assert told["padding_share"] <= padding and told["recomputed_share"] <= again, (name, completions, told)
            assert told["compiled_share"] >= 0.95
    assert shapes.generated()["recomputed_share"] <= 0.05


def test_every_row_lies_in_a_shape_that_holds_it():
    found = shapes.rows("short", 2)[:300]
    plan = shapes.batches(found, 4)
    made = layout.of_rows(found, lambda _: plan, 1)  # pyright: ignore[reportArgumentType]
    for row in found[:80]:
        batch = made.lay([row])
        text = [len(row.prompt) + len(c.tokens) for c in row.completions]
        assert batch.prompt_pad is None and batch.prompt.shape[1] <= len(row.prompt)
        assert int(batch.prompt_lengths[0]) == len(row.prompt)
        assert batch.mask.sum(1).tolist() == [len(c.tokens) for c in row.completions]
        room = {int(r): batch.prompt.shape[1] + s.tokens.shape[1] for s in batch.strips for r in np.array(s.rows)}
        assert all(room[i] >= n for i, n in enumerate(text))


def test_lengths_that_never_vary_are_one_shape_without_padding():
    found = [example(89, *[64] * 8)] * 20
    made = layout.of_rows(found, lambda _: [np.arange(20)], 1)  # pyright: ignore[reportArgumentType]
    for one in found:
        made.note(made.need([one]))
    assert made.shares() == {"shapes": 1, "compiled_share": 1, "padding_share": 0, "recomputed_share": 0}


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize(("length", "keys", "window"), [(70, 200, 16), (100, 100, 7), (33, 150, 20), (10, 500, 16)])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_blocks_is_attention_with_the_whole_mask(length: int, keys: int, window: int, sinks: bool):
    shapes = [(2, 4, length, 8), (2, 2, keys, 8), (2, 2, keys, 8), (4,)]
    arrays = [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    weight = mx.random.normal(shapes[0], key=mx.random.key(9))

    def value(function: Any) -> Any:
        def run(q: mx.array, k: mx.array, v: mx.array, sink: mx.array) -> mx.array:
            own = sink if sinks else None
            return (function(q, k, v, scale=0.3, mask=banded_attention.Band(window), sinks=own) * weight).sum()

        return mx.value_and_grad(run, argnums=(0, 1, 2))(*arrays)

    (found, slopes), (expected, theirs) = value(banded_attention.fused), value(banded_attention.reference)
    assert abs(found.item() - expected.item()) <= 1e-5 * float(mx.abs(weight).sum())
    assert all(float(mx.abs(a - b).max()) <= 1e-5 for a, b in zip(slopes, theirs, strict=True))


def test_a_window_needs_no_array_of_the_whole_row():
    """Memory grows with the row; with the whole mask by its square, which is four times as much for two."""
    sizes = {}
    for function in (banded_attention.fused, banded_attention.reference):
        for length in (1024, 2048):
            q, k, v = (mx.random.normal((1, 2, length, 8), key=mx.random.key(i)) for i in range(3))

            def loss(q: mx.array, k: mx.array, v: mx.array, function: Any = function) -> mx.array:
                return function(q, k, v, scale=0.3, mask=banded_attention.Band(32)).sum()

            mx.eval(q, k, v)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(mx.grad(loss, argnums=(0, 1, 2))(q, k, v))
            sizes[function, length] = mx.get_peak_memory() - before
    assert sizes[banded_attention.fused, 2048] <= 3 * sizes[banded_attention.fused, 1024]
    assert sizes[banded_attention.reference, 2048] >= 8 * sizes[banded_attention.fused, 2048]
