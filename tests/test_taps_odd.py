# SPDX-License-Identifier: Apache-2.0
"""Taps on models whose blocks are called by keyword, with tuples of caches, or not at all."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from odd_models import TAPPED, odd_model
from policy_tools import gap, make_batch, make_model, make_policy, weighed

import mlx_realign as mr
from mlx_realign import capture, forward, selfcheck, taps, vectors, writers
from mlx_realign.errors import UserError

TOKENS = mx.array([[5, 9, 2, 7, 30, 12, 44, 8]])
V = np.random.default_rng(2).standard_normal(64).astype(np.float32)
DIRECTION = vectors.Direction({1: V})


def by_hand(model: Any, change: Any, cache: Any = None, tokens: mx.array = TOKENS) -> np.ndarray:
    """Logits with block 1's output changed by a subclass of its own, so without taps."""
    block = model.layers[1]
    base = type(block)
    block.__class__ = type("Changed", (base,), {"__call__": lambda self, *a, **k: change(base.__call__(self, *a, **k))})
    try:
        return np.array(model(tokens, cache=cache))
    finally:
        block.__class__ = base


@pytest.mark.parametrize("arch", TAPPED)
def test_steering_is_the_change_made_by_hand(arch: str):
    model = odd_model(arch)
    plain = np.array(model(TOKENS))
    expected = by_hand(model, lambda h: h + 2 * mx.array(V))
    with mr.steer(model, DIRECTION, coefficient=2.0, operator="add", blocks=(1,)):
        np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_array_equal(model(TOKENS), plain)


@pytest.mark.parametrize("arch", TAPPED)
@pytest.mark.parametrize(
    ("positions", "steered"), [("prompt", [0, 1, 2, 3, 4]), ("generated", [5, 6, 7]), ("2:5", [2, 3, 4])]
)
def test_windows_are_where_they_are_said_to_be(arch: str, positions: str, steered: list[int]):
    """Without a cache, and with mlx-lm's, the text cut in two: the blocks' caches say where the second part begins."""
    model = odd_model(arch)
    on = mx.zeros((8, 1)).at[mx.array(steered)].add(1.0)
    expected = by_hand(model, lambda h: h + 2 * on * mx.array(V))
    asked = {"coefficient": 2.0, "operator": "add", "blocks": (1,), "positions": positions}
    with mr.steer(model, DIRECTION, prompt_length=5, **asked):
        np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
        cache = make_prompt_cache(model)
        parts = [model(TOKENS[:, :3], cache=cache), model(TOKENS[:, 3:], cache=cache)]
        np.testing.assert_allclose(mx.concatenate(parts, 1), expected, atol=1e-4)


@pytest.mark.parametrize("arch", TAPPED)
def test_captured_states_are_those_the_blocks_give(arch: str):
    policy = make_policy(odd_model(arch), rank=0)
    policy.sharing = arch == "gptj"
    rows = [[3, 4, 9, 5], [3, 4, 30, 8, 1, 22]]
    found = capture.collect(policy, rows, blocks=[1])
    for row, state in zip(rows, found, strict=True):
        seen: list[mx.array] = []
        by_hand(policy.model, lambda h, seen=seen: (seen.append(h), h)[1], tokens=mx.array([row]))
        np.testing.assert_allclose(state[0, 0], seen[0][0, -1], atol=1e-4)


def test_a_model_that_never_calls_its_blocks_is_refused_in_one_line():
    policy = make_policy(odd_model("iquestloopcoder"))
    for attempt in (
        lambda: mr.steer(policy, DIRECTION, blocks=(1,)),
        lambda: capture.collect(policy, [[1, 2]]),
        lambda: writers.find(policy),
    ):
        with pytest.raises(UserError, match=r"^model\.layers\.\d: iquestloopcoder models compute with the parts"):
            attempt()
    forward.checkpoint_layers(policy.model)
    told = selfcheck.run(policy).notes
    assert any(note.startswith("gradient checkpointing is off: iquestloopcoder models ") for note in told)


class Lost(nn.Module):
    """Its first block is called, and what it gives is thrown away."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.model, self.model_type = whole["model"], "lost"

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        h = self.model.embed_tokens(tokens)
        self.model.layers[0](h, None, None)
        return self.model.embed_tokens.as_linear(self.model.layers[1](h, None, None))

    @property
    def layers(self) -> list[Any]:
        return self.model.layers


class Streams(Lost):
    """Two residual streams."""

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        h = mx.stack([self.model.embed_tokens(tokens)] * 2, 2)
        for layer in self.layers:
            h = layer(h)
        return self.model.embed_tokens.as_linear(h.mean(2))


class Doubling(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return 2 * x


def test_a_block_whose_output_goes_nowhere_is_refused_and_the_others_are_not():
    model = Lost(make_model("llama"))
    with pytest.raises(UserError, match=r"layers\.0: in lost models what this block gives does not reach the logits"):
        taps.put(model, "model.layers.0", lambda x, _: x)
    with pytest.raises(UserError, match="does not reach"):  # nor does a layer in it
        taps.put(model, "model.layers.0.mlp.down_proj", lambda x, _: x)
    taps.put(model, "model.layers.1", lambda x, _: x).remove()
    assert not any(hasattr(type(m), "tapped_by_taps") for m in model.modules())


def test_several_residual_streams_are_refused():
    model = Streams(make_model("llama"))
    model.model.layers = [Doubling(), Doubling()]
    with pytest.raises(UserError, match=r"gives an array \[3, 2, 2, 64\] .* several residual streams"):
        taps.put(model, "model.layers.0", lambda x, _: x)


@pytest.mark.parametrize("arch", ["gptj", "falcon_h1"])
def test_layers_called_by_keyword_or_with_tuples_are_recomputed_and_give_the_same_gradient(arch: str):
    policy = make_policy(odd_model(arch))
    policy.sharing = arch == "gptj"
    before = policy.gradients(make_batch(), weighed())[1]
    forward.checkpoint_layers(policy.model)
    after = policy.gradients(make_batch(), weighed())[1]
    assert forward.recomputing(policy.model) and gap(after, before) < 1e-4
    assert len(tree_flatten(after)) == len(tree_flatten(before))


def test_where_no_cache_counts_tokens_the_start_can_be_told():
    model, starts = make_model("mamba2"), []
    cache = make_prompt_cache(model)
    handle = taps.put(model, taps.blocks(model)[0], lambda x, place: (starts.append(place.start), x)[1])
    model(TOKENS[:, :3], cache=cache)
    with taps.tell(start=mx.array([3])):
        model(TOKENS[:, 3:], cache=cache)
    handle.remove()
    assert starts[0] is None and starts[1].tolist() == [3]
