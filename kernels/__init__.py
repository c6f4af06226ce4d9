# SPDX-License-Identifier: Apache-2.0
"""Imported as `mlx_realign.kernels`. Each file: reference(), fused() with a gradient of its own, available().

`install` lets the modules of one model call the fused forms of functions of mlx-lm, after a check on this device.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import noise
from . import attention, banded_attention, experts, gated_delta, plain_gradient, scores_proof, swiglu
from .banded_attention import Band
from .switch import Switch

__all__ = ["Band", "Switch", "install"]

SWITCH = "_switch"  # attribute of the model
TOLERANCE = 1e-5  # relative to the largest entry, values and gradients, float32
TF32_TOLERANCE = 2e-2  # where matmuls may round to 10 bits: what is wrong is off by more


def install(model: Any) -> Switch:
    """Use the fused kernels in this model's own modules, where they prove right; the switch's notes say where not.

    mlx-lm itself, and other models in this process, stay as they are: same results, less time, for this model alone.
    A switch that is on the model already is closed: there is one at a time.
    """
    from mlx_lm.models import activations, base

    if left := model.__dict__.get(SWITCH):  # of a policy that was dropped and not closed
        left.close()
    switch = Switch()
    object.__setattr__(model, SWITCH, switch)
    switch.notes += scores_proof.run(model)
    (gated, wrong), (attending, wrong_too) = _swiglu(), _attention()
    for name, trouble in (("swiglu", wrong), ("scaled_dot_product_attention", wrong_too)):
        if trouble:
            switch.notes.append(f"kernel {name}: {trouble}; the reference is used")
    stock = base.scaled_dot_product_attention
    switch.put(stock, _attention_of(switch, stock, attending))
    if gated:
        switch.put(activations.swiglu, _swiglu_of(switch, activations.swiglu, gated))
    _recurrent(switch, model.modules())
    _experts(switch, model.modules())
    switch.take(model)
    switch.put_back(plain_gradient.set_modes(model))
    return switch


def _recurrent(switch: Switch, modules: list[Any]) -> None:
    """Functions of a recurrence whose kernels on a GPU have no gradient; looked at where a model file has them."""
    held: dict[str, Any] = {}
    for kind in {type(module) for module in modules}:  # by their functions: a model's own file is not in sys.modules
        held |= getattr(kind.__call__, "__globals__", {})
    if stock := held.get("gated_delta_update"):
        if trouble := _gated_delta():
            switch.notes.append(f"kernel gated_delta_update: {trouble}; mlx-lm's steps are used")
        fast = gated_delta.heads_of(modules) if gated_delta.on_gpu() else set()
        for heads in sorted(fast):
            if wrong := _fast_gated_delta(heads):
                switch.notes.append(f"mx.fast.gated_delta_update, {heads[0]} and {heads[1]} heads: {wrong}; not used")
                fast.discard(heads)
        switch.put(stock, gated_delta.of(lambda: switch.on, stock, chunks=trouble is None, fast=fast))
    if stock := held.get("wkv7_kernel"):
        switch.put(stock, plain_gradient.wkv7(stock))


def _experts(switch: Switch, modules: list[Any]) -> None:
    """A block of experts that calls them token by token."""
    for kind in {type(module) for module in modules}:
        if kind.__module__.endswith(".dbrx") and kind.__name__ == "SparseMoeBlock":
            if trouble := _experts_apart():
                switch.notes.append(f"kernel experts: {trouble}; mlx-lm's loop over tokens is used")
            else:
                switch.put(kind.__call__, experts.of(lambda: switch.on, kind.__call__))


@cache
def _experts_apart() -> str | None:
    """Both forms against mlx-lm's in training mode: tokens, the router's weights and those of the experts."""
    from mlx_lm.models import dbrx

    def bound(run: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def outputs(x: mx.array, router: mx.array, weights: mx.array) -> mx.array:
            block = SimpleNamespace(num_experts_per_tok=2, training=True, router=lambda x: x @ router)
            block.experts = [lambda x, w=w: mx.tanh(x @ w) for w in weights]
            return run(block, x)

        return outputs

    for form in (experts.by_expert, experts.dense):
        ours = bound(lambda block, x, form=form: form(block.experts, x, *experts.routed(block, x)))
        if trouble := _differs(ours, bound(dbrx.SparseMoeBlock.__call__), [(5, 8), (8, 6), (6, 8, 8)]):
            return trouble
    return None


@cache
def _gated_delta() -> str | None:
    """The chunked form against mlx-lm's steps, with a gate of each kind; more tokens than a chunk."""
    from mlx_lm.models.gated_delta import gated_delta_ops

    for channels, length in ((1, gated_delta.CHUNK + 3), (16, gated_delta.CHANNELS_CHUNK + 3)):
        shapes = [(1, length, 2, 16), (1, length, 2, 16), (1, length, 4, 8), (1, length, 4, channels), (1, length, 4)]

        def bound(run: Any, channels: int = channels) -> Any:
            def outputs(q: mx.array, k: mx.array, v: mx.array, gate: mx.array, beta: mx.array) -> mx.array:
                log_g, unit = -nn.softplus(gate), k / mx.linalg.norm(k, axis=-1, keepdims=True)
                log_g = log_g[..., 0] if channels == 1 else log_g
                y, last = run(q, unit, v, log_g, mx.sigmoid(beta), mx.zeros((1, 4, 8, 16)))
                return mx.concatenate([y.flatten(), last.flatten()])

            return outputs

        stepped = bound(lambda q, k, v, g, beta, state: gated_delta_ops(q, k, v, mx.exp(g), beta, state))
        if trouble := _differs(bound(gated_delta.chunked), stepped, shapes):
            return trouble
    return None


@cache
def _fast_gated_delta(heads: tuple[int, int]) -> str | None:
    """MLX's own function against the chunked form, at its width."""
    few, many = heads
    shapes = [(1, 67, few, 128), (1, 67, few, 128), (1, 67, many, 128), (1, 67, many), (1, 67, many)]

    def bound(run: Any) -> Any:
        def outputs(q: mx.array, k: mx.array, v: mx.array, gate: mx.array, beta: mx.array) -> mx.array:
            q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
            start = mx.zeros((1, many, 128, 128))
            return mx.concatenate([x.flatten() for x in run(q, k, v, -nn.softplus(gate), mx.sigmoid(beta), start)])

        return outputs

    own = bound(lambda q, k, v, g, beta, state: mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state))
    return _differs(own, bound(gated_delta.chunked), shapes)


@cache
def _swiglu() -> tuple[Callable[..., mx.array] | None, str | None]:
    if not swiglu.available():
        return None, None
    shapes = ((5, 33), (5, 33))
    return (None, trouble) if (trouble := _differs(swiglu.fused, swiglu.reference, shapes)) else (swiglu.fused, None)


@cache
def _attention() -> tuple[Callable[..., mx.array] | None, str | None]:
    """The mask is one of the arrays: models put half of their scores there."""
    if not attention.available():
        return None, None
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (2, 4, 5, 7))
    seen = mx.arange(2, 7)[:, None] >= mx.arange(7)
    for bind in (
        lambda f: lambda q, k, v, bias: f(q, k, v, scale=0.3, mask=mx.where(seen, bias, -mx.inf)),
        lambda f: lambda q, k, v, bias: f(q, k, v, scale=0.3, mask=seen) + 0 * bias.sum(),
    ):
        if trouble := _differs(bind(attention.fused), bind(attention.reference), shapes):
            return None, trouble
    return attention.fused, None


def _swiglu_of(switch: Switch, stock: Callable[..., mx.array], fused: Callable[..., mx.array]) -> Callable[..., Any]:
    return lambda gate, x: (fused if switch.on else stock)(gate, x)


def _attention_of(
    switch: Switch, stock: Callable[..., mx.array], fused: Callable[..., mx.array] | None
) -> Callable[..., mx.array]:
    """As mlx-lm calls it. Needed on every device: rows that share a prompt bring attention, and bands, of their own."""

    def scaled_dot_product_attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if queries.shape[2] > 1:  # not a step of decoding
            kind = "band" if isinstance(mask, Band) else "array" if isinstance(mask, mx.array) else "free"
            kind = "sinks" if sinks is not None and kind == "free" else kind
            switch.attended[queries.shape[3], kind] += 1
        lent = getattr(keys, "attend", None)  # keys of a layer that lends them
        if attend := getattr(cache, "attend", None) or lent:
            return attend(queries, scale=scale, mask=mask, sinks=sinks)
        if hasattr(cache, "pack"):  # of documents alone, each in a row
            apart = [cache.apart(x) for x in (queries, keys, values)]
            short = isinstance(mask, Band) and mask.window < apart[0].shape[2]
            found = scaled_dot_product_attention(*apart, None, scale, mask if short else "causal", sinks)
            return cache.together(found)
        if isinstance(mask, Band):
            attend_blocks = fused if switch.on else None
            return banded_attention.fused(
                queries, keys, values, scale=scale, mask=mask, sinks=sinks, attend=attend_blocks
            )
        if fused is None or not switch.on or hasattr(cache, "bits"):  # a quantised cache holds tuples
            return stock(queries, keys, values, cache, scale, mask, sinks)
        return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    return scaled_dot_product_attention


def _differs(fused: Callable[..., mx.array], reference: Callable[..., mx.array], shapes: Any) -> str | None:
    """What is wrong with a kernel on this device, or None: values and gradients against the reference."""
    arrays = [3 * mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    weight = mx.random.normal(reference(*arrays).shape, key=mx.random.key(9))
    try:
        for f, g in zip(_values(fused, arrays, weight), _values(reference, arrays, weight), strict=True):
            error = (mx.abs(f - g).max() / mx.maximum(mx.abs(g).max(), 1e-30)).item()
            if not error <= (TF32_TOLERANCE if noise.short_products() else TOLERANCE):
                return f"differs from its reference by {error:.1e}"
    except Exception as error:  # a kernel that cannot run here must not stop training
        return f"failed ({error})"
    return None


def _values(function: Callable[..., mx.array], arrays: list[mx.array], weight: mx.array) -> list[mx.array]:
    gradient = mx.grad(lambda *a: (function(*a) * weight).sum(), argnums=tuple(range(len(arrays))))
    return [function(*arrays), *gradient(*arrays)]
