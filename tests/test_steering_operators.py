# SPDX-License-Identifier: Apache-2.0
"""Operators are what their papers say, in NumPy's float64; a coefficient of 0 is the stream bit for bit."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign.errors import UserError
from mlx_realign.steering import Steer, operators, schedule
from mlx_realign.steering.schedule import Schedule
from mlx_realign.vectors import About, Direction

RNG = np.random.default_rng(3)
H = RNG.normal(size=(3, 5, 16))
U = np.linalg.qr(RNG.normal(size=(16, 16)))[0][:, :6].T.reshape(3, 2, 16)  # two orthonormal vectors per row
V = 2.5 * U[:, 0] + RNG.normal(size=(3, 16)) * 0.1


def parts(name: str) -> dict[str, Any]:
    """Numbers of three rows, float64."""
    every = {
        "vector": V[:, None],
        "unit": U[:, :1],
        "second": U[:, 1:],
        "low": np.array([-0.2, -np.inf, 0.3]).reshape(3, 1, 1),
        "high": np.array([0.1, 0.0, np.inf]).reshape(3, 1, 1),
        "target": np.array([-1.0, 0.5, 2.0]).reshape(3, 1, 1),
        "angle": np.radians([30.0, 200.0, -100.0]).reshape(3, 1, 1),
        "adaptive": np.zeros((3, 1, 1)),
    }
    return {part: every[part] for part in operators.parts(name)}


def run(name: str, coefficient: Any, h: np.ndarray = H, dtype: mx.Dtype = mx.float32, **more: Any) -> mx.array:
    given = {part: mx.array(np.asarray(value, np.float32)) for part, value in (parts(name) | more).items()}
    strength = mx.array(np.broadcast_to(np.asarray(coefficient, np.float32), (3, 1, 1)))
    return operators.find(name)(mx.array(h.astype(np.float32)).astype(dtype), strength, **given)


def expected(name: str, states: np.ndarray = H) -> np.ndarray:
    """At coefficient 1, token by token and by the formulas as published."""
    out = np.zeros_like(states)
    p = parts(name)
    for b in range(3):
        u, w, v = U[b, 0], U[b, 1], V[b]
        for t in range(5):
            h = states[b, t]
            s = float(h @ u)
            if name == "add":
                out[b, t] = h + v
            elif name == "add_norm":
                out[b, t] = (h + v) * np.linalg.norm(h) / np.linalg.norm(h + v)
            elif name == "ablate":
                out[b, t] = h - s * u
            elif name == "ablate_add":
                out[b, t] = h - s * u + v
            elif name == "clamp":
                out[b, t] = h + (np.clip(s, p["low"][b, 0, 0], p["high"][b, 0, 0]) - s) * u
            elif name == "affine":
                out[b, t] = h - s * u + p["target"][b, 0, 0] * u
            else:
                angle, inside = p["angle"][b, 0, 0], math.hypot(s, float(h @ w))
                flat = h - s * u - (h @ w) * w
                out[b, t] = flat + inside * (math.cos(angle) * u + math.sin(angle) * w)
    return out


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_an_operator_at_coefficient_1_is_its_formula(name):
    np.testing.assert_allclose(np.array(run(name, 1.0)), expected(name), atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_a_coefficient_of_0_is_the_stream_bit_for_bit_and_no_stream_is_upcast(name, dtype):
    strange = H.copy()
    strange[0, 0, 0], strange[0, 1, 1], strange[1, 2, 2] = -0.0, np.inf, 1e-42  # signs, infinities, denormals
    h = mx.array(strange.astype(np.float32)).astype(dtype)
    out = run(name, [[[0.0]], [[0.0]], [[1.0]]], strange, dtype)
    assert out.dtype == dtype
    bits = mx.uint32 if dtype == mx.float32 else mx.uint16
    assert mx.array_equal(out[:2].view(bits), h[:2].view(bits))
    assert not mx.array_equal(out[2], h[2])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_half_precision_streams_are_rounded_once_or_twice_and_dots_not_at_all(name, dtype):
    wide = [np.tile(x, 64) for x in (H, U, V)]  # long dots, whose rounding would show
    h = np.array(mx.array(wide[0].astype(np.float32)).astype(dtype).astype(mx.float32)).astype(np.float64)
    units = wide[1] / 8
    given = {"vector": wide[2][:, None], "unit": units[:, :1], "second": units[:, 1:]}
    chosen = {k: v for k, v in given.items() if k in operators.parts(name)}
    out = np.array(run(name, 1.0, h, dtype, **chosen).astype(mx.float32))
    whole = np.array(run(name, 1.0, h, mx.float32, **chosen))
    step = 2**-7 if dtype == mx.bfloat16 else 2**-10
    most = np.maximum(np.abs(whole), np.abs(h)) + np.abs(whole - h)
    assert (np.abs(out - whole) <= step * most + 1e-6).all()


def test_lengths_and_angles_are_what_they_should_be():
    for name in ("add_norm", "angular"):
        for share in (1.0, 0.4, -2.0):
            lengths = np.linalg.norm(np.array(run(name, share)), axis=-1)
            np.testing.assert_allclose(lengths, np.linalg.norm(H, axis=-1), rtol=1e-5)
    turned = np.array(run("angular", 1.0)).astype(np.float64)
    for b, degrees in enumerate((30, 200, -100)):
        angle = np.degrees(np.arctan2(turned[b] @ U[b, 1], turned[b] @ U[b, 0]))
        np.testing.assert_allclose((angle - degrees + 180) % 360, 180, atol=1e-3)
    half = np.array(run("angular", 0.5)).astype(np.float64)
    for b, degrees in enumerate((30, 200, -100)):  # half of the shorter way
        before = np.degrees(np.arctan2(H[b] @ U[b, 1], H[b] @ U[b, 0]))
        after = np.degrees(np.arctan2(half[b] @ U[b, 1], half[b] @ U[b, 0]))
        way = (degrees - before + 180) % 360 - 180
        np.testing.assert_allclose((after - before - way / 2 + 180) % 360, 180, atol=1e-3)


def test_adaptive_turns_only_states_on_the_direction_s_side():
    out = np.array(run("angular", 1.0, adaptive=np.ones((3, 1, 1))))
    ahead = np.einsum("btd,bd->bt", H, U[:, 0]) > 0
    assert 0 < ahead.sum() < ahead.size
    np.testing.assert_array_equal(out[~ahead], H.astype(np.float32)[~ahead])
    np.testing.assert_allclose(out[ahead], expected("angular")[ahead], atol=1e-5)


def test_shares_go_that_share_of_the_way_and_ablate_add_removes_no_more_than_there_is():
    for name in operators.SHARES[:3]:
        np.testing.assert_allclose(np.array(run(name, 0.25)), H + 0.25 * (expected(name) - H), atol=1e-5)
    along = np.einsum("btd,bd->bt", H, U[:, 0])[..., None] * U[:, None, 0]
    for c in (0.5, 3.0, -3.0):
        goal = H - min(abs(c), 1) * along + c * V[:, None]
        np.testing.assert_allclose(np.array(run("ablate_add", c)), goal, atol=2e-5)


def test_an_unknown_operator_gets_the_nearest_name():
    with pytest.raises(UserError, match="ablate"):
        operators.find("ablat")


def test_schedules_by_hand_and_by_row():
    index = mx.array([[-2, -1, 0, 1, 2, 4, 9]])
    rows = [
        Schedule(),
        Schedule("linear", 4),
        Schedule("linear", 2, 0.0, 3.0),
        Schedule("decay", 2),
        Schedule("decay", 1, 2.0, 1.0),
    ]
    found = np.array(schedule.factor(index, mx.array(np.stack([row.numbers() for row in rows]))))
    by_hand = [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0.75, 0.5, 0, 0],
        [0, 0, 0, 1.5, 3, 3, 3],
        [1, 1, 1, 0.5**0.5, 0.5, 0.25, 0.5**4.5],
        [2, 2, 2, 1.5, 1.25, 1 + 2**-4, 1 + 2**-9],
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_schedules_are_read_and_refused():
    assert schedule.read("constant") == Schedule()
    assert schedule.read("linear:32") == Schedule("linear", 32)
    assert schedule.read("decay:8:0:1.5") == Schedule("decay", 8, 0, 1.5)
    for text in ("linear", "linear:0", "linear:x", "decay:3:1", "constant:3", "lineer:3", "linear:inf"):
        with pytest.raises(UserError, match="schedule"):
            schedule.read(text)


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_gradients_go_through_an_operator(name):
    """Training with steering on: slopes along random ways against differences of the formula in float64."""
    rng = np.random.default_rng(5)
    weights, way = rng.normal(size=H.shape), rng.normal(size=H.shape)
    given = {part: mx.array(np.asarray(value, np.float32)) for part, value in parts(name).items()}
    strength = mx.ones((3, 1, 1))
    total = lambda h: (operators.find(name)(h, strength, **given) * mx.array(weights.astype(np.float32))).sum()  # noqa: E731
    slope = float((np.array(mx.grad(total)(mx.array(H.astype(np.float32)))).astype(np.float64) * way).sum())
    step = 1e-6
    ahead, behind = (float((expected(name, H + s * step * way) * weights).sum()) for s in (1, -1))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-3, abs=1e-3)


def test_a_coefficient_is_not_carried_to_where_it_means_another_strength():
    vectors = {block: np.ones(8) for block in (0, 1)}
    known = Direction(vectors, About(coefficient=0.5, blocks=(1,)), {}, {0: 2.0, 1: 3.0})
    assert Steer.of(known, blocks=(0,)).coefficient == Steer.of(known, operator="add_norm").coefficient == 0.5
    assert Steer.of(known, operator="ablate").coefficient == Steer.of(known, coefficient=1.0, blocks=(0, 1)).coefficient
    for changes, message in (
        ({"blocks": (0, 1)}, "block 1 alone: for 2 blocks"),
        ({"unit": "median_norm"}, "the unit"),
    ):
        with pytest.raises(UserError, match=f"0.5 is the coefficient that was found for {message}"):
            Steer.of(known, **changes)
