# SPDX-License-Identifier: Apache-2.0
"""Taps change what a block gives where they should, know where in a text they are, and leave no trace."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from policy_tools import ALL, SHARING, gap, make_batch, make_examples, make_model, make_policy, speaking, weighed

from mlx_realign import data, forward, rollout, taps
from mlx_realign.errors import UserError
from mlx_realign.sampling import Sampling

WIDTH = 64  # of the tiny models
TOKENS = mx.array([[5, 9, 2, 7, 30, 12]])


def names(model: Any) -> list[str]:
    return [name for name, _ in tree_flatten(model.parameters())]


@pytest.mark.parametrize("arch", ALL)
def test_a_tap_sees_what_the_next_block_reads_and_leaves_no_trace(arch):
    model = make_model(arch)
    before, parameters, classes = model(TOKENS), names(model), [type(m) for m in model.modules()]
    first, second = taps.blocks(model)[:2]
    seen: dict[str, mx.array] = {}
    handles = [
        taps.put(model, first, lambda x, _: seen.setdefault("gives", x)),
        taps.put(model, second, lambda x, _: seen.setdefault("reads", x), before=True),
        taps.put(model, second, lambda x, _: x + 1.0),
    ]
    changed = model(TOKENS)
    assert mx.array_equal(seen["gives"], seen["reads"]) and seen["gives"].shape[:2] == (1, 6)
    assert not mx.allclose(changed, before) and names(model) == parameters
    for handle in handles[1::-1] + handles[2:]:  # in another order than they were put on
        handle.remove()
        handle.remove()
    assert mx.array_equal(model(TOKENS), before) and [type(m) for m in model.modules()] == classes


def test_a_tap_that_looks_at_its_place_gets_it_beside_one_that_does_not():
    model = make_model("llama")
    cache, starts = make_prompt_cache(model), []
    path = taps.blocks(model)[1]
    taps.put(model, path, taps.anywhere(lambda x, place: (starts.append(place.start), x)[1]))
    model(TOKENS, cache=cache)
    model(TOKENS, cache=cache)
    assert starts == [0, 0]  # alone it is told nothing
    looking = taps.put(model, path, lambda x, place: (starts.append(place.start), x)[1])
    model(TOKENS, cache=cache)
    assert starts[2:] == [12, 12]
    looking.remove()
    taps.put(model, f"{path}.mlp", lambda x, place: (starts.append(place.start), x)[1])
    model(TOKENS, cache=cache)
    assert starts[4] == 18  # a layer inside gets it from the block


def test_two_taps_on_one_block_are_called_in_order_and_removed_in_any():
    model, block = make_model("llama"), "model.layers.1"
    calls: list[str] = []
    put = lambda name: taps.put(model, block, lambda x, _: (calls.append(name), x)[1])  # noqa: E731
    first, second, third = put("first"), put("second"), put("third")
    second.remove()
    model(TOKENS)
    first.remove()
    model(TOKENS)
    third.remove()
    model(TOKENS)
    assert calls == ["first", "third", "third"]


def test_a_layer_inside_a_block_is_told_where_the_block_is():
    model = make_model("llama")
    cache = make_prompt_cache(model)
    places: list[np.ndarray] = []
    look = lambda x, place: (places.append(np.array(place.positions(x.shape[1]))), x)[1]  # noqa: E731
    handle = taps.put(model, "model.layers.0.mlp.down_proj", look)
    model(TOKENS, cache=cache)
    model(TOKENS[:, :1], cache=cache)
    assert [p.tolist() for p in places] == [[[0, 1, 2, 3, 4, 5]], [[6]]]  # where the columns begin, not where they end
    handle.remove()
    assert not any(hasattr(type(m), "tapped_by_taps") for m in model.modules())


@pytest.mark.parametrize("sharing", [True, False])
def test_positions_and_prompt_ends_are_right_in_both_ways_through_a_model(sharing):
    """Each completion token is counted from its own prompt's end, whatever the padding."""
    policy = make_policy("llama", rank=0)
    examples = make_examples([(7, [3, 5]), (2, [4])])
    batch, way = data.collate(examples), forward.shared if sharing else forward.plain
    after: list[np.ndarray] = []

    def look(x: mx.array, place: taps.Place) -> mx.array:
        last = place.last_prompt()
        assert last is not None
        after.append(np.array(place.positions(x.shape[1]) - last[:, None]))
        return x

    handle = taps.put(policy.model, "model.layers.0", look)
    mx.eval(way(policy.model, policy.body.hidden, batch))
    handle.remove()
    if sharing:
        prompt, completion = after
        assert prompt[:, -1].tolist() == [-1, -1]  # prompts are computed without their last tokens
        assert completion.tolist() == [[0, 1, 2, 3, 4]] * 3
    else:
        assert [row[0] for row in after[0].tolist()] == [-6, -6, -1]


def test_rows_of_a_rollout_have_configurations_of_their_own(monkeypatch):
    """A tap that adds a row's own vector gives each row what a batch of its own would."""
    policy = speaking(monkeypatch, "llama", rank=0)
    table = 3 * mx.random.normal((3, WIDTH), key=mx.random.key(1))
    prompts = [[3, 4, 9], [5, 9, 2, 7, 7, 1, 30], [4, 8], [5, 9, 2, 7, 7, 1, 30]]

    def add(x: mx.array, place: taps.Place) -> mx.array:
        variant = place.variant()
        return x + table[mx.array([0]) if variant is None else variant][:, None]

    handle = taps.put(policy.model, "model.layers.0", add)
    asked = Sampling(max_new_tokens=6, temperature=0)
    try:
        together = rollout.rollout(policy, prompts, asked, variants=[0, 1, 2, 2], rows=2)
        for prompt, variant, (row,) in zip(prompts, [0, 1, 2, 2], together, strict=True):
            ((one,),) = rollout.rollout(policy, [prompt], asked, variants=[variant])
            assert one.tokens.tolist() == row.tokens.tolist()
            np.testing.assert_allclose(one.logps, row.logps, atol=1e-4)
    finally:
        handle.remove()


def test_a_compiled_step_reads_a_holder_anew_and_traces_once(monkeypatch):
    policy = speaking(monkeypatch, "llama", rank=0)
    policy.compile()
    holder = taps.hold(policy.model, {"vector": mx.zeros(WIDTH)})
    traces: list[int] = []

    def add(x: mx.array, _: taps.Place) -> mx.array:
        traces.append(1)
        return x + holder["vector"]

    handle = taps.put(policy.model, "model.layers.0", add)
    asked = Sampling(max_new_tokens=8, temperature=0)
    run = lambda: rollout.rollout(policy, [[3, 4, 9]], asked)[0][0].tokens.tolist()  # noqa: E731
    plain, calls = run(), len(traces)
    assert calls < 8  # fewer than there are steps: the trace was used again
    holder["vector"] = 9 * mx.random.normal(holder["vector"].shape, key=mx.random.key(2))
    assert run() != plain
    holder["vector"] = mx.zeros(WIDTH)
    assert run() == plain
    handle.remove()
    taps.release(policy.model, holder)
    assert taps.HELD not in policy.model


@pytest.mark.parametrize("arch", [arch for arch in SHARING if arch != "llama4_text"])
def test_a_tapped_model_trains_as_before(arch):
    """A tap that changes nothing changes no gradient, checkpointed or not."""
    policy = make_policy(arch)
    batch = make_batch()

    def gradients() -> list[np.ndarray]:
        grads = policy.gradients(batch, loss)[1]
        return [np.array(g) for _, g in tree_flatten(grads)]

    def loss(scores: Any, batch: Any) -> Any:
        from mlx_realign.batch import LossOutput

        return LossOutput(-scores.logps.sum(), mx.array(1.0), {})

    before = gradients()
    handle = taps.put(policy.model, taps.blocks(policy.model)[0], lambda x, _: x)
    for one, other in zip(gradients(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    forward.checkpoint_layers(policy.model)
    for one, other in zip(gradients(), before, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    forward.uncheckpoint_layers(policy.model)
    handle.remove()


def test_taps_and_checkpointing_come_off_in_any_order():
    """What recomputes is told by how often a block runs in a gradient: twice."""
    policy, runs = make_policy("llama"), []
    path, layer = taps.blocks(policy.model)[1], forward.layers_of(policy.model)[1]
    look = lambda x, _: (runs.append(1), x)[1]  # noqa: E731

    def times(tapped: bool) -> int:
        """How often the block ran, told by a tap of its own where there is none."""
        own = None if tapped else taps.put(policy.model, path, look)
        runs.clear()
        policy.gradients(make_batch(), weighed())
        if own:
            own.remove()
        return len(runs)

    once = times(False)
    first = type(layer)
    forward.checkpoint_layers(policy.model)
    handle = taps.put(policy.model, path, look)
    twice = times(True)
    forward.uncheckpoint_layers(policy.model)
    assert times(True) == once, "it is still tapped, and no longer recomputed"
    handle.remove()
    forward.checkpoint_layers(policy.model)
    forward.uncheckpoint_layers(policy.model)
    assert type(layer) is first
    handle = taps.put(policy.model, path, look)
    forward.checkpoint_layers(policy.model)
    assert times(True) == 2 * once and twice == once, "the tap is inside of what is recomputed, or outside"
    handle.remove()
    before = policy.gradients(make_batch(), weighed())[1]
    forward.uncheckpoint_layers(policy.model)
    assert gap(policy.gradients(make_batch(), weighed())[1], before) < 1e-4


def test_a_path_outside_the_blocks_is_refused():
    model = make_model("llama")
    with pytest.raises(UserError, match="no such block"):
        taps.put(model, "model.embed_tokens", lambda x, _: x)
    with pytest.raises(UserError, match="no such block"):
        taps.put(model, "model.layers.9", lambda x, _: x)
