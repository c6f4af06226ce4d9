# SPDX-License-Identifier: Apache-2.0
"""Adapter layers: off and fresh ones are their base, on ones follow the papers' formulas in float64, gradients too."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ARCHITECTURES
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_realign import adapter
from mlx_realign.adapter_layers import (
    DoRALinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    base_of,
    dense_weight,
    wrap,
)

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 8, list(range(40, 104))])
ROWS, IN, OUT, RANK, SCALE = 6, 64, 32, 3, 1.7
KEY = mx.random.key(5)


def move(model: nn.Module) -> None:
    """As if trained: every adapter tensor away from its start."""
    mx.random.seed(1)
    for layer in adapter.adapters_of(model).values():
        shift(layer)


def shift(layer: Any) -> None:
    layer.lora_a = layer.lora_a + 0.05 * mx.random.normal(layer.lora_a.shape)
    layer.lora_b = layer.lora_b + 0.1 * mx.random.normal(layer.lora_b.shape)
    if "m" in layer:
        layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape))


def quantized(model: nn.Module, bits: int = 4) -> nn.Module:
    nn.quantize(model, 32, bits)
    return model


BASES: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(IN, OUT, bias=False),
    "dense with bias": lambda: nn.Linear(IN, OUT),
    "quantised": lambda: nn.QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=False), 32, 4),
    "quantised with bias": lambda: nn.QuantizedLinear.from_linear(nn.Linear(IN, OUT), 64, 8),
    "mxfp4": lambda: nn.QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=False), mode="mxfp4"),
}


def layer_on(base: str, dora: bool, dropout: float = 0.0) -> LoRALinear | DoRALinear:
    mx.random.seed(3)
    layer = wrap(BASES[base](), rank=RANK, scale=SCALE, dropout=dropout, dora=dora, key=KEY)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    shift(layer)
    assert isinstance(layer, LoRALinear | DoRALinear)
    return layer


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def formula(base: Any, dora: bool) -> Callable[..., np.ndarray]:
    """float64 y(x, A, B, m); DoRA's norm is a constant, as in its paper's gradient (arXiv:2402.09353, section 4.3)."""
    weight, bias = wide(dense_weight(base)), wide(base.bias) if "bias" in base else 0.0
    layer_norm: list[np.ndarray] = []

    def y(x: np.ndarray, a: np.ndarray, b: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
        whole = weight + SCALE * (a @ b).T
        if not dora:
            return x @ whole.T + bias
        if not layer_norm:
            layer_norm.append(np.linalg.norm(whole, axis=1))
        return (x @ whole.T) * (m / layer_norm[0]) + bias

    return y


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_values_and_gradients_are_those_of_the_formula_in_float64(base: str, dora: bool):
    layer = layer_on(base, dora)
    x, dy = mx.random.normal((2, ROWS, IN), key=KEY), mx.random.normal((2, ROWS, OUT), key=mx.random.key(6))
    y = formula(base_of(layer), dora)
    names = ["lora_a", "lora_b"] + (["m"] if dora else [])
    places = [wide(x), *(wide(layer[name]) for name in names)]
    assert np.abs(wide(layer(x)) - y(*places)).max() < 1e-4

    def objective(values: list[mx.array]) -> mx.array:
        layer.update(dict(zip(names, values[1:], strict=True)))
        return (layer(values[0]) * dy).sum()

    gradients = mx.grad(objective)([x, *(layer[name] for name in names)])
    random, step = np.random.default_rng(0), 1e-6
    for i, gradient in enumerate(gradients):
        for _ in range(4):
            direction = random.standard_normal(places[i].shape)
            ends = [[p + sign * step * direction if j == i else p for j, p in enumerate(places)] for sign in (1, -1)]
            expected = sum((y(*end) * wide(dy)).sum() * sign for end, sign in zip(ends, (1, -1), strict=True)) / (
                2 * step
            )
            found = (wide(gradient) * direction).sum()
            assert found == pytest.approx(expected, rel=2e-5, abs=2e-4), (names, i)


@pytest.mark.parametrize("dora", [False, True])
def test_a_trained_base_gets_its_gradient_too(dora: bool):
    """Of DoRA's m / n (W x + s B A x) + bias with a constant n, as mlx-lm and PEFT take it."""
    layer = layer_on("dense with bias", dora)
    layer.unfreeze()
    x = mx.random.normal((ROWS, IN), key=KEY)
    objective = lambda model: (model(x) ** 2).sum()  # noqa: E731
    found = nn.value_and_grad(layer, objective)(layer)[1]["linear"]
    dy = 2 * layer(x)
    gain = layer.m / layer.norm() if isinstance(layer, DoRALinear) else mx.ones(OUT)
    assert mx.allclose(found["weight"], (dy * gain).T @ x, rtol=1e-5, atol=1e-4)
    assert mx.allclose(found["bias"], dy.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["dense with bias", "quantised"])
def test_gradients_are_the_same_compiled_and_checkpointed(base: str, dora: bool):
    layer, x = layer_on(base, dora), mx.random.normal((ROWS, IN), key=KEY)

    def through(run: Callable[[nn.Module, mx.array], mx.array], x: mx.array) -> dict[str, Any]:
        parameters = layer.trainable_parameters()
        gradients = nn.value_and_grad(layer, lambda model, x: (run(model, x) ** 2).sum())(layer, x)[1]
        layer.update(parameters)  # the trace left its own in the layer
        return gradients

    def checkpointed(model: nn.Module, x: mx.array) -> mx.array:
        def inner(parameters: dict[str, Any], x: mx.array) -> mx.array:
            model.update(parameters)
            return model(x)

        return mx.checkpoint(inner)(model.trainable_parameters(), x)

    plain = dict(tree_flatten(through(lambda model, x: model(x), x)))
    compiled = mx.compile(lambda x: through(lambda model, x: model(x), x), inputs=layer.state)
    both = mx.compile(lambda x: through(checkpointed, x), inputs=layer.state)
    for other in (through(checkpointed, x), compiled(x), both(x)):
        found = dict(tree_flatten(other))
        assert set(found) == set(plain)
        assert all(mx.allclose(found[name], plain[name], rtol=1e-5, atol=1e-4) for name in plain)


def test_dropout_is_the_same_when_recomputed_and_off_without_a_key():
    layer, x = layer_on("dense", dora=False, dropout=0.4), mx.ones((400, IN))
    without = layer(x)
    assert mx.array_equal(without, layer_on("dense", dora=False)(x))
    layer._dropout_key = mx.random.key(9)
    kept = wide(layer.drop(x))
    assert set(np.unique(kept).round(4)) == {0.0, round(1 / 0.6, 4)}
    assert kept.mean() == pytest.approx(1.0, abs=0.02)  # 25600 draws: a standard deviation is 0.005

    def gradient(run: Callable[..., mx.array]) -> dict[str, mx.array]:
        return mx.grad(lambda parameters: (run(parameters, x) ** 2).sum())(layer.trainable_parameters())

    def call(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x)

    plain, again = gradient(call), gradient(mx.checkpoint(call))
    assert all(mx.allclose(again[name], plain[name], rtol=1e-4, atol=1e-2) for name in ("lora_a", "lora_b"))
    layer._dropout_key = mx.random.key(10)
    assert not mx.allclose(gradient(call)["lora_b"], plain["lora_b"], rtol=1e-2)


def test_every_layer_draws_its_own_dropout(tiny_model: Callable[..., Any]):
    model = tiny_model("llama")
    adapter.attach(model, rank=2, alpha=4, dropout=0.5)
    move(model)
    plain = model(TOKENS)
    adapter.set_dropout_key(model, mx.random.key(1))
    keys = {str(wide(layer["_dropout_key"])) for layer in adapter.adapters_of(model).values()}
    assert len(keys) == len(adapter.adapters_of(model))
    first = model(TOKENS)
    assert mx.array_equal(first, model(TOKENS)) and not mx.array_equal(first, plain)
    adapter.set_dropout_key(model, None)
    assert mx.array_equal(model(TOKENS), plain)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dora_norm_is_that_of_the_dequantised_sum_for_every_bit_width(bits: int):
    mx.random.seed(bits)
    base = nn.QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=False), 32, bits)
    layer = wrap(base, rank=RANK, scale=SCALE, dropout=0, dora=True, key=KEY)
    assert isinstance(layer, DoRALinear) and layer.lora_a.shape == (IN, RANK)
    shift(layer)
    whole = wide(dense_weight(base)) + SCALE * (wide(layer.lora_a) @ wide(layer.lora_b)).T
    assert np.abs(wide(layer.norm()) / np.linalg.norm(whole, axis=1) - 1).max() < 1e-5


def test_a_row_of_zeros_does_not_divide_by_zero():
    base = nn.Linear(IN, OUT, bias=False)
    base.weight = mx.zeros((OUT, IN))
    layer = wrap(base, rank=RANK, scale=SCALE, dropout=0, dora=True, key=KEY)
    assert mx.array_equal(layer(mx.ones((2, IN))), mx.zeros((2, OUT)))
    gradients = nn.value_and_grad(layer, lambda model: (model(mx.ones((2, IN))) + 1).square().sum())(layer)[1]
    assert all(mx.isfinite(value).all() for value in dict(tree_flatten(gradients)).values())


def test_experts_follow_the_formula():
    mx.random.seed(0)
    layer = wrap(SwitchLinear(IN, OUT, 4, bias=True), rank=RANK, scale=SCALE, dropout=0, dora=False, key=KEY)
    assert isinstance(layer, LoRASwitchLinear)
    shift(layer)
    x, chosen = mx.random.normal((5, 1, 1, IN)), [[0, 3], [1, 1], [2, 0], [3, 2], [0, 1]]
    a, b, weight, bias = (wide(v) for v in (layer.lora_a, layer.lora_b, layer.linear.weight, layer.linear.bias))
    found = wide(layer(x, mx.array(chosen)))
    for t in range(5):
        for k, e in enumerate(chosen[t]):
            expected = (weight[e] + SCALE * b[e] @ a[e]) @ wide(x[t, 0, 0]) + bias[e]
            assert np.abs(found[t, k, 0] - expected).max() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_an_embedding_and_its_use_as_head_follow_the_formula(packed: bool):
    mx.random.seed(0)
    base = nn.Embedding(40, IN)
    layer = wrap(base.to_quantized(32, 4) if packed else base, rank=RANK, scale=SCALE, dropout=0, dora=False, key=KEY)
    assert isinstance(layer, LoRAEmbedding)
    assert mx.array_equal(layer.lora_a, mx.zeros((40, RANK)))  # a token never seen stays where it was
    shift(layer)
    whole = wide(dense_weight(base_of(layer))) + SCALE * wide(layer.lora_a) @ wide(layer.lora_b)
    x = mx.random.normal((3, IN))
    assert np.abs(wide(layer(mx.array([[1, 39]]))) - whole[[[1, 39]]]).max() < 1e-4
    assert np.abs(wide(layer.as_linear(x)) - wide(x) @ whole.T).max() < 1e-4


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bfloat16_stream_stays_bfloat16_and_the_adapter_float32(
    tiny_model: Callable[..., Any], dora: bool, packed: bool
):
    model = tiny_model("qwen2")  # its projections have a bias
    model.set_dtype(mx.bfloat16)
    if packed:
        quantized(model)
    adapter.attach(model, rank=4, alpha=8, dora=dora)
    move(model)
    assert model(TOKENS).dtype == mx.bfloat16
    gradients = nn.value_and_grad(model, lambda m: m(TOKENS).astype(mx.float32).square().mean())(model)[1]
    assert {value.dtype for value in dict(tree_flatten(gradients)).values()} == {mx.float32}
    assert {value.dtype for value in adapter.state(model).values()} == {mx.float32}


CASES = [(arch, False, {}) for arch in ARCHITECTURES] + [
    ("llama", True, {}),
    ("llama", False, {"dora": True}),
    ("qwen2", False, {"dora": True}),
    ("llama", True, {"dora": True}),
    ("qwen3_moe", True, {}),
    ("llama", False, {"targets": "all-linear,embed_tokens"}),
    ("olmoe", False, {"targets": "all-linear,embed_tokens,lm_head"}),
]


@pytest.mark.parametrize(("arch", "packed", "options"), CASES)
def test_a_fresh_adapter_and_one_turned_off_are_the_base_bit_for_bit(
    tiny_model, arch: str, packed: bool, options: dict
):
    model = quantized(tiny_model(arch)) if packed else tiny_model(arch)
    base = model(TOKENS)
    paths = adapter.attach(model, rank=4, alpha=8, **options)
    assert mx.array_equal(model(TOKENS), base)
    assert set(adapter.adapters_of(model)) == set(paths)
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trained == set(adapter.state(model)) and len(trained) == len(paths) * (3 if options.get("dora") else 2)
    move(model)
    assert mx.abs(model(TOKENS) - base).max() > 0.1
    adapter.set_enabled(model, False)
    assert mx.array_equal(model(TOKENS), base)


def test_on_and_off_share_one_compiled_trace(tiny_model: Callable[..., Any]):
    model = tiny_model("qwen3")
    base = model(TOKENS)
    adapter.attach(model, rank=4, alpha=8, dora=True)
    move(model)
    traced = []

    def forward(tokens: mx.array) -> mx.array:
        traced.append(1)
        return model(tokens)

    compiled = mx.compile(forward, inputs=model.state)
    on = compiled(TOKENS)
    adapter.set_enabled(model, False)
    assert mx.allclose(compiled(TOKENS), base, atol=1e-4) and not mx.allclose(on, base, atol=0.1)
    adapter.set_enabled(model, True)
    assert mx.array_equal(compiled(TOKENS), on)
    assert len(traced) == 1


def test_scale_start_and_seed(tiny_model: Callable[..., Any]):
    def start(**options: Any) -> dict[str, Any]:
        model = tiny_model("llama")
        adapter.attach(model, rank=16, alpha=32, **options)
        return adapter.adapters_of(model)

    first, again, other = start(), start(), start(seed=1)
    path = "model.layers.1.mlp.down_proj"
    assert first[path].scale == 2.0 and first[path]._scale.item() == 2.0
    assert start(rslora=True)[path].scale == 8.0  # 32 / sqrt(16), arXiv:2312.03732
    a = wide(first[path].lora_a)
    assert a.shape == (128, 16) and np.abs(a).max() <= 128**-0.5
    assert a.std() == pytest.approx(128**-0.5 / np.sqrt(3), rel=0.05)  # of a uniform on [-b, b]: b / sqrt(3)
    assert all(mx.array_equal(first[p].lora_a, again[p].lora_a) for p in first)
    assert not any(mx.array_equal(first[p].lora_a, other[p].lora_a) for p in first)
    assert not mx.array_equal(first[path].lora_a[:64], first["model.layers.0.mlp.up_proj"].lora_a)
