# SPDX-License-Identifier: Apache-2.0
"""Kernels serve the modules of one policy: mlx-lm, and whoever else uses it, go on as if there were none."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ARCHITECTURES
from kernel_tools import Arrays, assert_near
from mlx_lm.models import activations, base, llama
from policy_tools import make_model, make_policy
from test_kernels import on_cpu

from mlx_realign import adapter, forward, kernels, taps
from mlx_realign.errors import UserError
from mlx_realign.kernels import attention, swiglu
from mlx_realign.kernels.switch import Switch

NAMES = {"scaled_dot_product_attention": base, "swiglu": activations}
ORIGINAL = {name: getattr(module, name) for name, module in NAMES.items()}
TOKENS = mx.array([[5, 9, 200, 3, 17], [1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def unchecked_kernels() -> Iterator[None]:
    """As in a new process; and at the end mlx-lm's functions are where they were."""
    for check in (kernels._swiglu, kernels._attention):
        check.cache_clear()
    yield
    for check in (kernels._swiglu, kernels._attention):
        check.cache_clear()
    for module in [m for n, m in sys.modules.items() if n.startswith("mlx_lm.models.")]:
        for name in NAMES.keys() & vars(module).keys():
            assert getattr(module, name) is ORIGINAL[name], module


layers = forward.layers_of


def numbers(model: nn.Module) -> list[mx.array]:
    start = model.parameters()
    total = lambda p: (model.update(p), model(TOKENS).square().mean())[1]  # noqa: E731
    found = [model(TOKENS), mx.grad(total)(start)["model"]["embed_tokens"]["weight"]]
    model.update(start)
    mx.eval(found, model.parameters())
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with each call of a fused kernel, which are those of any device."""
    calls: list[str] = []
    for module in (attention, swiglu):
        name, right = module.__name__.rpartition(".")[2], module.fused
        monkeypatch.setattr(module, "fused", lambda *a, n=name, f=right, **k: (calls.append(n), f(*a, **k))[1])
        monkeypatch.setattr(module, "available", lambda: True)
    return calls


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in ("mamba2", "lfm2")])
def test_the_kernels_change_which_functions_run_and_not_the_numbers(arch: str, monkeypatch: pytest.MonkeyPatch):
    calls = counted(monkeypatch)
    model, other = make_model(arch), make_model(arch)
    before = numbers(model)
    switch = kernels.install(model)
    calls.clear()
    for found, expected in zip(numbers(model), before, strict=True):
        assert_near(found, expected, 1e-4)
    assert "attention" in calls
    calls.clear()
    again = numbers(other)  # another user of the same architecture
    switch.on = False
    again += numbers(model)
    switch.close()
    again += numbers(model)
    assert not calls
    assert all(mx.array_equal(x, y) for x, y in zip(again, before * 3, strict=True))
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]


def test_classes_look_like_those_they_are_made_from():
    model = make_model("llama")
    kernels.install(model)
    kind = type(layers(model)[0].self_attn)
    assert kind is not llama.Attention
    assert issubclass(kind, llama.Attention)
    assert [getattr(kind, n) for n in ("__name__", "__qualname__", "__module__")] == [
        getattr(llama.Attention, n) for n in ("__name__", "__qualname__", "__module__")
    ]
    assert {type(layer.self_attn) for layer in layers(model)} == {kind}  # one for all of them


def test_a_function_of_the_same_name_is_another_one(monkeypatch: pytest.MonkeyPatch):
    """Somebody else's attention, or a model's own, is left alone."""
    theirs: list[float] = []

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> mx.array:
        theirs.append(1)
        return ORIGINAL["scaled_dot_product_attention"](*args, **kwargs)

    monkeypatch.setattr(llama, "scaled_dot_product_attention", scaled_dot_product_attention)
    model = make_model("llama")
    switch = kernels.install(model)
    assert type(layers(model)[0].self_attn) is llama.Attention
    model(TOKENS)
    assert len(theirs) == len(layers(model))
    switch.close()
    monkeypatch.undo()


def helped(x: mx.array, times: int) -> mx.array:
    return named(x) if times == 0 else helped(x, times - 1)


def named(x: mx.array) -> mx.array:
    return x


class Outer(nn.Module):
    def __call__(self, x: mx.array, *, more: float = 1.0) -> mx.array:
        return [named(part) for part in [x]][0] + more  # a nested piece of code

    def indirect(self, x: mx.array) -> mx.array:
        return helped(x, 2)

    def none(self, x: mx.array) -> mx.array:
        return x


class Inner(Outer):
    def none(self, x: mx.array) -> mx.array:
        return named(super().none(x))

    def indirect(self, x: mx.array) -> mx.array:
        return x


def test_methods_are_found_wherever_they_call_it():
    switch = Switch()
    switch.put(named, lambda x: 10 * x)
    outer, inner, one = Outer(), Inner(), mx.array(1.0)
    switch.take(outer)
    switch.take(inner)
    found = (outer(one), outer(one, more=2.0), outer.indirect(one), outer.none(one))
    assert [f.item() for f in found] == [11, 12, 10, 1]
    assert [f.item() for f in (inner(one), inner.indirect(one), inner.none(one))] == [11, 1, 10]
    assert Outer()(one).item() == 2
    assert helped(one, 2).item() == 1
    switch.close()
    assert (type(outer), type(inner), outer.indirect(one).item()) == (Outer, Inner, 1)


def test_two_policies_have_a_switch_each(monkeypatch: pytest.MonkeyPatch):
    calls = counted(monkeypatch)
    one, two = make_policy("llama"), make_policy("llama")
    one.kernels.on = False
    calls.clear()
    one.model(TOKENS)
    assert not calls
    two.model(TOKENS)
    assert calls


def test_a_second_switch_over_a_model_closes_the_first(monkeypatch: pytest.MonkeyPatch):
    calls = counted(monkeypatch)
    model, stock = make_model("llama"), make_model("llama")
    first, second = kernels.install(model), kernels.install(model)
    assert first.closed
    for second.on in (True, False):
        calls.clear()
        model(TOKENS)
        assert bool(calls) == second.on
    for switch in (first, second):
        switch.close()
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_a_model_serves_one_policy_at_a_time():
    """Two would train and switch the same modules; one that was closed, or that nobody holds any more, is in no way."""
    model = make_model("llama")
    first = make_policy(model, rank=0)
    with pytest.raises(UserError, match=r"serves the policy 'tiny' already.*close\(\)"):
        make_policy(model, rank=0)
    assert not first.kernels.closed and type(layers(model)[0].self_attn) is not llama.Attention
    first.close()
    second = make_policy(model, rank=0)
    second.itself = second  # pyright: ignore[reportAttributeAccessIssue]  # in a cycle
    del second
    with make_policy(model, rank=0):
        first.close()
        assert type(layers(model)[0].self_attn) is not llama.Attention
    assert not [m for m in model.modules() if "switched_from" in vars(type(m))]


def test_closing_a_policy_gives_the_model_back():
    with make_policy("llama", rank=0) as policy:
        assert type(layers(policy.model)[0].self_attn) is not llama.Attention
    policy.close()
    assert type(layers(policy.model)[0].self_attn) is llama.Attention
    assert mx.array_equal(policy.model(TOKENS), make_model("llama")(TOKENS))


def test_closing_under_taps_and_checkpoints(monkeypatch: pytest.MonkeyPatch):
    """What was put over the kernels stays and works, with mlx-lm's functions inside; and the other way round."""
    calls = counted(monkeypatch)
    policy = make_policy("llama", rank=0)
    forward.checkpoint_layers(policy.model)
    handle = taps.put(policy.model, "model.layers.0.self_attn", taps.anywhere(lambda x, _: 2 * x))
    expected = make_model("llama")
    other = taps.put(expected, "model.layers.0.self_attn", taps.anywhere(lambda x, _: 2 * x))
    policy.close()
    calls.clear()
    assert_near(policy.model(TOKENS), expected(TOKENS), 1e-5)
    assert not calls
    handle.remove()
    other.remove()
    forward.uncheckpoint_layers(policy.model)
    assert_near(policy.model(TOKENS), expected(TOKENS), 1e-5)
    assert not calls


def test_adapters_come_and_go_over_the_kernels():
    policy = make_policy("llama")
    policy.close()
    stock = make_model("llama")
    adapter.attach(stock, rank=4, alpha=8.0)
    stock.load_weights(list(adapter.state(policy.model).items()), strict=False)
    assert mx.array_equal(policy.model(TOKENS), stock(TOKENS))


# ---------------------------------------------------------------------------------------------- wrong kernels


def wrong_value(gate: mx.array, x: mx.array) -> mx.array:
    return swiglu.reference(gate, x) * 1.001


@mx.custom_function
def wrong_gradient(gate: mx.array, x: mx.array) -> mx.array:
    return nn.silu(gate) * x


@wrong_gradient.vjp
def _(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
    return cotangent * primals[1], cotangent * nn.silu(primals[0])


def not_finite(gate: mx.array, x: mx.array) -> mx.array:
    return swiglu.reference(gate, x) * mx.array(np.nan)


def raising(gate: mx.array, x: mx.array) -> mx.array:
    raise RuntimeError("no such instruction here")


@on_cpu
@pytest.mark.parametrize("kernel", [wrong_value, wrong_gradient, not_finite, raising], ids=lambda f: "")
def test_a_wrong_kernel_is_not_installed(kernel: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(swiglu, "fused", kernel)
    model = make_model("llama")
    (note,) = kernels.install(model).notes
    assert note.startswith("kernel swiglu: ")
    assert "the reference is used" in note
    assert type(layers(model)[0].mlp) is llama.MLP
    assert type(layers(model)[0].self_attn) is not llama.Attention  # the sound one is


def forgets_the_mask(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
    return attention.reference(q, k, v, scale=scale)


def no_gradient_to_masks(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any
) -> mx.array:
    mask = mx.stop_gradient(mask) if isinstance(mask, mx.array) else mask
    return attention.reference(q, k, v, scale=scale, mask=mask)


@on_cpu
@pytest.mark.parametrize("kernel", [forgets_the_mask, no_gradient_to_masks])
def test_a_wrong_attention_is_not_installed(kernel: Callable[..., mx.array], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "fused", kernel)
    model = make_model("llama")
    expected = make_model("llama")(TOKENS)
    (note,) = kernels.install(model).notes
    assert note.startswith("kernel scaled_dot_product_attention: differs from its reference by")
    assert_near(model(TOKENS), expected, 1e-4)


def test_modes_are_put_back_when_the_policy_is_closed():
    layer = type("KimiK3DecoderLayer", (nn.Module,), {"__module__": "mlx_lm.models.kimi_k3"})
    model = make_model("llama")
    model.odd, model.trained = layer(), layer()
    model.eval()
    model.trained.train()
    switch = kernels.install(model)
    assert model.odd.training and model.trained.training and not model.training
    switch.close()
    assert not model.odd.training and model.trained.training


def test_a_model_whose_own_file_is_no_module_of_python_is_taken():
    model = make_model("llama")
    odd = type("Odd", (nn.Module,), {"__module__": "custom_model", "__call__": lambda self, x: x})
    model.odd = odd()
    assert "custom_model" not in sys.modules
    kernels.install(model).close()
