# SPDX-License-Identifier: Apache-2.0
"""Optimizers, schedules and clipping against arithmetic done by hand or in numpy."""

import math
from typing import Any, get_args, get_type_hints

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_realign import optim
from mlx_realign.config import TrainSettings

OPTIMIZERS = get_args(get_type_hints(TrainSettings)["optimizer"])
ONE = mx.array(1.0)


class Small(nn.Module):
    """As an adapter with DoRA: two matrices and a vector, and one matrix too large to be packed."""

    def __init__(self) -> None:
        super().__init__()
        draw = lambda i, *shape: mx.random.normal(shape, key=mx.random.key(i))  # noqa: E731
        self.lora_a, self.lora_b, self.m = draw(0, 6, 2), draw(1, 2, 5), draw(2, 5)
        mx.random.seed(0)
        self.blocks = [nn.Linear(3, 3), nn.Linear(3, 3)]
        self.large = draw(3, 512, 513)
        self.blocks[0].freeze()


def gradients(model: nn.Module, seed: int) -> dict[str, Any]:
    """A tree of random gradients for the trainable parameters."""
    rng = np.random.default_rng(seed)
    flat = optim.flat(model.trainable_parameters())
    draw = {path: mx.array(rng.normal(size=value.shape).astype(np.float32)) for path, value in flat.items()}
    return tree_unflatten(list(draw.items()))


def run(model: nn.Module, updater: optim.Updater, seeds: range, rate: float = 0.01) -> None:
    for seed in seeds:
        packed, _ = updater.clip(gradients(model, seed), ONE)
        updater.update(model, packed, rate)


def entries(model: nn.Module) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in optim.flat(model.parameters()).items()}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),  # 4 steps after the warm-up: down by a quarter each
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),  # cos 0, 45, 90, 135 degrees
    ],
)
def test_learning_rate_of_six_steps_with_two_of_warm_up(schedule, expected):
    settings = TrainSettings(lr_schedule=schedule, warmup_steps=2)
    rates = [optim.learning_rate(settings, 3e-4, step, 6) for step in range(1, 7)]
    np.testing.assert_allclose(rates, [3e-4 * share for share in expected], rtol=1e-12)


def test_learning_rate_without_warm_up_starts_at_the_peak_and_a_run_shorter_than_it_never_gets_there():
    assert optim.learning_rate(TrainSettings(), 1.0, 1, 10) == 1.0
    assert [optim.learning_rate(TrainSettings(warmup_steps=8), 1.0, step, 2) for step in (1, 2)] == [0.125, 0.25]


def test_the_norm_is_global_and_clipping_keeps_the_direction():
    model = nn.Module()
    model.a, model.b = mx.zeros((2,)), mx.zeros((1,))
    grads = {"a": mx.array([6.0, 0.0]), "b": mx.array([8.0])}  # over two units: 3, 0, 4 and a norm of 5
    for limit, expected in ((1.0, [0.6, 0.0, 0.8]), (10.0, [3.0, 0.0, 4.0]), (0.0, [3.0, 0.0, 4.0])):
        updater = optim.Updater(TrainSettings(optimizer="sgd", max_grad_norm=limit), model.parameters())
        packed, norm = updater.clip(grads, mx.array(2.0))
        assert norm.item() == 5.0
        np.testing.assert_allclose(np.array(packed["float32"]), expected, rtol=1e-6)


def test_small_tensors_travel_as_one_vector_per_dtype_and_come_back():
    model = Small()
    model.m = model.m.astype(mx.bfloat16)
    updater = optim.Updater(TrainSettings(), model.trainable_parameters())
    packed = updater.pack(model.trainable_parameters())
    assert {name: value.size for name, value in packed.items()} == {"large": 512 * 513, "float32": 34, "bfloat16": 5}
    back = updater.unpack(packed, optim.flat(model.trainable_parameters()))
    for path, value in optim.flat(model.trainable_parameters()).items():
        assert mx.array_equal(back[path], value) and back[path].dtype == value.dtype


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_papers_with_bias_correction(decay):
    """arXiv:1711.05101, algorithm 2, in float64."""
    model = Small()
    before = {path: value.astype(np.float64) for path, value in entries(model).items()}
    settings = TrainSettings(optimizer="adamw", weight_decay=decay, max_grad_norm=0)
    run(model, optim.Updater(settings, model.trainable_parameters()), range(3))
    grads = [optim.flat(gradients(model, seed)) for seed in range(3)]
    for path, value in entries(model).items():
        expected, m, v = before[path], 0.0, 0.0
        for t, step in enumerate(grads, 1) if path in grads[0] else ():
            g = np.array(step[path]).astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            expected = expected * (1 - 0.01 * decay)
            expected = expected - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_packing_changes_no_update(name):
    """The same rule of mlx.optimizers, tensor by tensor."""
    settings = TrainSettings(optimizer=name, max_grad_norm=0, weight_decay=0 if name == "adam" else 0.1)
    packed, plain = Small(), Small()
    run(packed, optim.Updater(settings, packed.trainable_parameters()), range(3))
    rule = optim.make(settings)
    for seed in range(3):
        for part in getattr(rule, "optimizers", [rule]):
            part.learning_rate = 0.01
        rule.update(plain, gradients(plain, seed))
    for path, value in entries(plain).items():
        np.testing.assert_allclose(entries(packed)[path], value, rtol=1e-6, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name):
    settings = TrainSettings(optimizer=name)
    straight = Small()
    run(straight, optim.Updater(settings, straight.trainable_parameters()), range(4))
    halted = Small()
    first = optim.Updater(settings, halted.trainable_parameters())
    run(halted, first, range(2))
    saved = {key: mx.array(np.array(value)) for key, value in first.state().items()}
    second = optim.Updater(settings, halted.trainable_parameters())
    second.restore(saved)
    run(halted, second, range(2, 4))
    for path, value in entries(straight).items():
        np.testing.assert_array_equal(entries(halted)[path], value, err_msg=path)
    frozen = entries(Small())["blocks.0.weight"]
    np.testing.assert_array_equal(entries(straight)["blocks.0.weight"], frozen)


def test_weights_that_others_have_changed_are_seen():
    """After a step the updater knows the weights as one vector; a checkpoint that is loaded meanwhile counts."""
    settings = TrainSettings(optimizer="sgd", max_grad_norm=0)
    model = Small()
    updater = optim.Updater(settings, model.trainable_parameters())
    run(model, updater, range(1))
    model.lora_a = mx.ones((6, 2))
    run(model, updater, range(1, 2), rate=0.5)
    expected = 1 - 0.5 * np.array(gradients(model, 1)["lora_a"])
    np.testing.assert_allclose(entries(model)["lora_a"], expected, rtol=1e-6)


def test_a_state_that_lacks_an_array_is_not_restored():
    model = Small()
    updater = optim.Updater(TrainSettings(), model.trainable_parameters())
    with pytest.raises(KeyError, match="float32.v"):
        updater.restore({key: value for key, value in updater.state().items() if key != "float32.v"})


def test_muon_orthogonalises_matrices_and_gives_vectors_to_adamw():
    model = Small()
    before = entries(model)
    run(model, optim.Updater(TrainSettings(optimizer="muon"), model.trainable_parameters()), range(1), rate=0.1)
    moved = before["lora_b"] - entries(model)["lora_b"]  # [2, 5]: Newton-Schulz takes singular values near 1
    assert np.all(np.abs(np.linalg.svd(moved / 0.1, compute_uv=False) - 1) < 0.35)
    vector = (before["m"] - entries(model)["m"]) / 0.1
    np.testing.assert_allclose(np.abs(vector), 1, rtol=1e-3)  # Adam's first step: the sign


def test_the_rules_are_mlx_own():
    kinds = {name: optim.make(TrainSettings(optimizer=name, weight_decay=0.1)) for name in OPTIMIZERS}
    assert type(kinds["lion"]) is mlx_optim.Lion and type(kinds["sgd"]) is mlx_optim.SGD
    assert type(kinds["adamw"]) is mlx_optim.AdamW and type(kinds["adafactor"]) is mlx_optim.Adafactor
    assert type(kinds["adam"]) is mlx_optim.Adam
