# SPDX-License-Identifier: Apache-2.0
"""Steering is exact: with and without caches, alone and in a batch, on and off, in every way through a model."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from policy_tools import make_batch, make_model, make_policy

from mlx_realign import data, forward, taps
from mlx_realign.errors import UserError
from mlx_realign.steering import Schedule, Steer, steer
from mlx_realign.vectors import About, Direction

TOKENS = mx.array([[5, 9, 2, 7, 30, 12, 4, 81, 3]])
KINDS = ["llama", "qwen3", "gemma2", "gemma3_text", "qwen3_moe", "4-bit"]
WIDE = 64


def model_of(kind: str) -> nn.Module:
    """A tiny random model, its attention's windows longer than the texts here."""
    if kind != "4-bit":
        return make_model(kind)
    model = make_model("llama")
    nn.quantize(model, group_size=32, bits=4)
    return model


def direction(seed: int = 0, scale: float = 3.0, blocks: tuple[int, ...] = (-1, 0, 1), **about: Any) -> Direction:
    rng = np.random.default_rng(seed)
    vectors = {block: scale * rng.normal(size=WIDE) for block in blocks}
    baseline = {block: rng.normal(size=WIDE) for block in blocks}
    return Direction(vectors, About(**about), baseline, {block: 5.0 + block for block in blocks})


EVERY = {
    "add": {},
    "add_norm": {},
    "ablate": {},
    "ablate_add": {},
    "clamp": {"low": -0.1, "high": 0.2},
    "affine": {"shift": 0.5},
    "angular": {"angle": 100.0},
}


def of(operator: str, seed: int = 0, **changes: Any) -> Steer:
    return Steer(direction(seed), operator=operator, **(EVERY[operator] | changes))


def decoded(model: nn.Module, tokens: mx.array, prompt: int, pieces: int = 99) -> mx.array:
    """Logits [B, T, V] of a prompt in pieces and single tokens after it, through mlx-lm's own caches."""
    cache = make_prompt_cache(model)
    ends = [*range(pieces, prompt, pieces), prompt, *range(prompt + 1, tokens.shape[1] + 1)]
    starts = [0, *ends]
    return mx.concatenate([model(tokens[:, a:b], cache=cache) for a, b in zip(starts, ends, strict=False)], 1)


def close(one: mx.array, other: mx.array, limit: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(one), np.array(other), atol=limit)


@pytest.mark.parametrize("operator", EVERY)
def test_a_whole_pass_is_what_the_formula_does_behind_each_block(operator):
    """Block by block by hand on the model's own layers: the residual stream has no other entrance."""
    from mlx_realign.steering import operators

    model = make_model("llama")
    one = of(operator, coefficient=0.7)
    with steer(model, one):
        found = model(TOKENS)
    inner: Any = model.model
    by_block = {block: one.numbers(block) for block in (-1, 0, 1)}

    def act(h: mx.array, block: int) -> mx.array:
        given = {k: mx.array(v)[None] for k, v in by_block[block].items()}
        return operators.find(operator)(h, mx.array([[[0.7]]]), **given)

    h = act(inner.embed_tokens(TOKENS), -1)
    for block, layer in enumerate(inner.layers):
        h = act(layer(h, "causal"), block)
    close(found, inner.embed_tokens.as_linear(inner.norm(h)), 1e-5)
    assert not mx.allclose(found, model(TOKENS), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["add", "ablate", "angular"])
def test_decoding_with_a_cache_is_the_whole_pass(kind, operator):
    model = model_of(kind)
    base = model(TOKENS)
    with steer(model, of(operator)) as steering:
        whole = model(TOKENS)
        assert not mx.allclose(whole, base, atol=1e-2)
        for pieces in (99, 2, 1):
            close(decoded(model, TOKENS, 6, pieces), whole)
        steering.off()
        assert mx.array_equal(model(TOKENS), base)
    assert mx.array_equal(model(TOKENS), base)


@pytest.mark.parametrize("positions", ["prompt", "generated", "last", "2:7", "-3:", "-3:0", "1:-1", ":4"])
@pytest.mark.parametrize(("kind", "block"), [("llama", 0), ("gemma4_text", 3), ("lfm2", 0)])
def test_positions_are_the_same_tokens_in_every_way_through_a_model(kind, block, positions):
    """A prompt of 6 tokens: what is steered, looked up in a table by hand, and reached by four ways.

    Block 3 of that Gemma 4 has no cache of its own, and that of lfm2's block 0, a convolution, counts no tokens.
    """
    table = {
        "prompt": range(6),
        "generated": range(6, 9),
        "last": [5],
        "2:7": range(2, 7),
        "-3:": range(3, 9),
        "-3:0": range(3, 6),
        "1:-1": range(1, 5),
        ":4": range(4),
    }
    model, vector = make_model(kind), direction(1).vectors[0]
    added = np.zeros((1, 9, WIDE), np.float32)
    added[:, list(table[positions])] = 2 * vector
    handle = taps.put(model, f"model.layers.{block}", lambda h, _: h + mx.array(added))
    expected = model(TOKENS)
    handle.remove()
    asked = Steer(Direction({block: vector}), 2.0, positions=positions)
    with steer(model, asked, prompt_length=6):
        close(model(TOKENS), expected)
        for pieces in (99, 4):
            close(decoded(model, TOKENS, 6, pieces), expected)
        close(decoded(model, TOKENS, 5), expected)  # as mlx_lm.generate does: the prompt's last token by itself
    if kind == "lfm2":
        return  # its prompts cannot be shared
    policy = make_policy(model, rank=0)
    with steer(policy, asked):
        batch = batch_of([(6, 3), (6, 2)])
        for way in (forward.shared, forward.plain):
            states = way(model, policy.body.hidden, batch).completion
            close(policy.body.logits(states[0, :3]), expected[0, 5:8])


def batch_of(shapes: list[tuple[int, int]]) -> Any:
    """Texts that begin like TOKENS, of these prompt and completion lengths, and a longer one that makes padding."""
    from mlx_realign.batch import Completion, Example

    text = np.array(TOKENS[0]).astype(np.int32)
    examples = [Example(text[:p], (Completion(text[p : p + c], np.ones(c, bool)),), 0, "", {}) for p, c in shapes]
    long = np.concatenate([text, text])
    examples.append(Example(long, (Completion(text[:4], np.ones(4, bool)),), 0, "", {}))
    return data.collate(examples)


def test_where_no_prompt_ends_are_known_several_tokens_are_prompt_and_single_ones_are_not():
    model = make_model("llama")
    far = steer(model, Steer(direction(1), 2.0, positions="prompt"), prompt_length=6)
    expected = decoded(model, TOKENS, 6)
    far.remove()
    with steer(model, Steer(direction(1), 2.0, positions="prompt")):
        close(decoded(model, TOKENS, 6), expected)
        close(decoded(model, TOKENS, 6, 2), expected)
    for positions in ("last", "-2:"):
        with steer(model, Steer(direction(1), 2.0, positions=positions)):
            model(TOKENS)  # a pass without a cache is a whole prompt
            with pytest.raises(UserError, match="prompt_length"):
                decoded(model, TOKENS, 6)


@pytest.mark.parametrize("known", [True, False])
def test_a_schedule_counts_generated_tokens_whatever_the_cache(known):
    model, vector = make_model("llama"), direction(1).vectors[0]
    added = np.zeros((1, 9, WIDE), np.float32)
    for i, factor in enumerate([1] * 6 + [1, 0.5, 0.25]):
        added[:, i] = 2 * factor * vector
    handle = taps.put(model, "model.layers.0", lambda h, _: h + mx.array(added))
    expected = model(TOKENS)
    handle.remove()
    one = Steer(direction(1), 2.0, blocks=(0,), schedule=Schedule("decay", 1))
    with steer(model, one, prompt_length=6 if known else None):
        close(decoded(model, TOKENS, 6), expected)
        close(decoded(model, TOKENS, 6, 4), expected)
        for way in (KVCache, lambda: RotatingKVCache(32)):
            cache = [way() for _ in taps.blocks(model)]
            parts = [model(TOKENS[:, :6], cache=cache), *(model(TOKENS[:, i : i + 1], cache=cache) for i in (6, 7, 8))]
            close(mx.concatenate(parts, 1), expected)


def test_several_steers_act_in_the_order_given_at_the_same_block_too():
    model = make_model("llama")
    first, second = of("add", 1, blocks=(0,)), of("ablate", 1, blocks=(0,))

    def by_hand(order: list[Steer]) -> mx.array:
        handles = [steer(model, one) for one in order]
        found = model(TOKENS)
        for one in handles:
            one.remove()
        return found

    for order in ([first, second], [second, first]):
        expected = by_hand(order)
        with steer(model, *order):
            assert mx.array_equal(model(TOKENS), expected)
    assert not mx.allclose(by_hand([first, second]), by_hand([second, first]), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_nested_steerings_come_off_in_any_order_and_leave_nothing(kind):
    model = model_of(kind)
    base, classes = model(TOKENS), [type(m) for m in model.modules()]
    names = [name for name, _ in tree_flatten(model.parameters())]
    alone = {}
    for name in ("add", "affine"):
        with steer(model, of(name)):
            alone[name] = model(TOKENS)
    first, second = steer(model, of("add")), steer(model, of("affine"))
    first.remove()
    assert mx.array_equal(model(TOKENS), alone["affine"])
    second.remove()
    assert mx.array_equal(model(TOKENS), base)
    with steer(model, of("add")):
        with steer(model, of("affine")):
            assert not mx.array_equal(model(TOKENS), alone["add"])
        assert mx.array_equal(model(TOKENS), alone["add"])
    assert mx.array_equal(model(TOKENS), base)
    assert [type(m) for m in model.modules()] == classes
    assert [name for name, _ in tree_flatten(model.parameters())] == names and taps.HELD not in model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "4-bit"])
def test_rows_with_vectors_of_their_own_are_what_each_is_alone(kind):
    model = model_of(kind)
    rows = [
        [of("add", 1, coefficient=2.0)],
        [of("ablate", 2), of("add", 3, blocks=(1,))],
        [],
        [of("add", 4, positions="2:5"), of("angular", 5)],
    ]
    tokens = mx.concatenate([TOKENS, TOKENS[:, ::-1], TOKENS, (TOKENS * 7) % 50])
    alone = []
    for steers, row in zip(rows, tokens, strict=True):
        with steer(model, of("affine", 6), *steers):
            alone.append(model(row[None])[0])
    with steer(model, of("affine", 6), rows=rows), taps.tell(variant=mx.arange(4)):
        close(model(tokens), mx.stack(alone), 1e-4)
        close(decoded(model, tokens, 5), mx.stack(alone), 1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_models_stay_at_their_precision(dtype):
    model = make_model("llama")
    model.set_dtype(dtype)
    base = model(TOKENS)
    seen: list[mx.Dtype] = []
    for operator in EVERY:
        kinds: tuple[dict[str, Any], ...] = ({}, {"positions": "generated"}, {"schedule": Schedule("decay", 2)})
        for changes in kinds:
            steering = steer(model, of(operator, coefficient=0.0, **changes))
            handle = taps.put(model, "model.layers.1", lambda h, _: (seen.append(h.dtype), h)[1])
            assert mx.array_equal(model(TOKENS), base)
            steering.set(coefficient=1.0)
            assert model(TOKENS).dtype == dtype
            steering.remove()
            handle.remove()
    assert set(seen) == {dtype} and len(seen) == 42


def test_numbers_can_be_set_and_what_is_more_than_a_number_cannot():
    model = make_model("llama")
    with steer(model, of("add"), of("clamp"), rows=[[], [of("angular")]]) as steering:
        steering.set(coefficient=2.0)
        steering.set(1, low=-2.0, coefficient=0.5)
        steering.set(2, row=1, angle=-30.0, direction=direction(9))
        goal = [of("add", coefficient=2.0), of("clamp", low=-2.0, coefficient=0.5)]
        goal.append(of("angular", 9, angle=-30.0))
        for variant, steers in ((0, goal[:2]), (1, goal)):
            with taps.tell(variant=mx.array([variant])):
                found = model(TOKENS)
            steering.off()
            with steer(model, *steers):
                close(model(TOKENS), found, 1e-5)
            steering.on()
        refused: list[dict[str, Any]] = [{"operator": "ablate"}, {"blocks": (0,)}, {"positions": "last"}]
        for changes in [*refused, {"schedule": Schedule("decay")}]:
            with pytest.raises(UserError, match="cannot be set"):
                steering.set(**changes)
        with pytest.raises(UserError, match="no steer 2"):
            steering.set(2, angle=3.0)
        with pytest.raises(UserError, match="no configuration 2"):
            steering.set(row=2, coefficient=1.0)
        with pytest.raises(UserError, match="no setting"):
            steering.set(strength=1.0)


def test_padding_is_left_alone():
    """Pads of a left-padded batch: what the block gives there is what it gives unsteered."""
    policy = make_policy("llama", rank=0)
    batch = make_batch()
    seen: list[tuple[mx.array, mx.array]] = []
    look = lambda h, place: (seen.append((h, place.positions(h.shape[1]))), h)[1]  # noqa: E731
    for operator in ("add", "ablate", "angular"):
        outs = []
        for coefficient in (0.0, 1.0):
            seen.clear()
            with steer(policy, of(operator, coefficient=coefficient, blocks=(0,))):
                handle = taps.put(policy.model, "model.layers.0", look)
                mx.eval(forward.shared(policy.model, policy.body.hidden, batch))
                handle.remove()
            outs.append(seen[0])  # the prompts
        (plain, positions), (steered, _) = outs
        pads = np.array(positions) < 0
        assert pads.any()
        changed = (np.array(plain) != np.array(steered)).any(-1)
        np.testing.assert_array_equal(changed, ~pads)


def test_a_direction_is_used_as_its_file_means_it_to_be():
    made = direction(
        1, operator="ablate_add", positions="generated", coefficient=0.5, strength_unit="median_norm", blocks=(1,)
    )
    one = Steer.of(made)
    assert (one.operator, one.positions, one.coefficient, one.unit, one.at) == (
        "ablate_add", "generated", 0.5, "median_norm", (1,)
    )  # fmt: skip
    other = Steer.of(made, operator="add", positions="all")
    assert (other.operator, other.positions, other.coefficient) == ("add", "all", 1.0)  # calibrated for another one
    length = np.linalg.norm(one.numbers(1)["vector"])
    assert length == pytest.approx(6.0) and one.direction.norm(1) != pytest.approx(6.0)


def test_what_cannot_be_steered_is_said_in_one_line():
    model, some = make_model("llama"), direction()
    with pytest.raises(UserError, match="use it as --condition"):
        Steer.of(direction(operator="condition"))
    with pytest.raises(UserError, match="rows is empty"):
        steer(model, some, rows=[])
    assert Steer(some, blocks=1).at == (1,)  # pyright: ignore[reportArgumentType]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"operator": "adds"}, "Did you mean add"),
        ({"positions": "first"}, "positions 'first'"),
        ({"positions": "5:5"}, "no position"),
        ({"blocks": (7,)}, "no vector for block 7"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"coefficient": "2"}, "coefficient is 2, expected a finite number"),
        ({"low": 1.0}, "low belongs to clamp"),
        ({"operator": "clamp"}, "needs low, high"),
        ({"operator": "clamp", "low": 2.0, "high": 1.0}, "above high"),
        ({"operator": "angular"}, "needs an angle"),
        ({"operator": "angular", "angle": 3.0, "second": some}, "is the direction itself"),
        ({"unit": "norm"}, "unit is 'norm'"),
        ({"strength": 2}, "no setting 'strength'"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            steer(model, some, **changes)
    bare = Direction({0: np.ones(WIDE), 5: np.ones(WIDE)})
    wrong = [
        ({"operator": "affine"}, "mean of the negatives"),
        ({"unit": "median_norm"}, "how long the states"),
        ({"blocks": (5,)}, "no block 5"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            steer(model, bare, **{"blocks": (0,), **changes})
    with pytest.raises(UserError, match="no direction"):
        steer(model)
    for odd in ((Direction({0: np.ones(32)}),), (some, Direction({0: np.ones(32)}))):
        with steer(model, *odd), pytest.raises(UserError, match="another model"):
            model(TOKENS)
    assert taps.HELD not in model
